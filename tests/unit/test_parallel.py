"""What `parallel.initialize` refuses before it joins anything."""

from __future__ import annotations

import pytest
import torch

from megatron_sip import parallel
from megatron_sip.config import Parallel
from megatron_sip.platform import Platform

CPU = Platform("cpu", "gloo", torch.device("cpu"), torch.float32, None)


def test_another_number_of_ranks_than_the_recipe_names_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=r"started 1 ranks, but parallel.world_size is 2.*nproc"):
        parallel.initialize(Parallel(world_size=2), CPU, seed=1)


def test_a_start_without_torchrun_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is not set: start with torchrun"):
        parallel.initialize(Parallel(world_size=1), CPU, seed=1)
