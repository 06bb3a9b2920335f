"""What --explain says of the host is what a real exchange and a real checkpoint take."""

from __future__ import annotations

from pathlib import Path

import host_tasks
import pytest
import torch
from workers import Layout, Workers

from megatron_sip.explain.host import host_needs
from megatron_sip.explain.parameters import count_parameters
from megatron_sip.recipe import load_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
VOCAB = 4096


@pytest.mark.parametrize(
    ("layout", "bucket_mib"), [(Layout(dp=2), 256), (Layout(tp=2), 5)], ids=str
)
def test_shared_memory_and_the_copy_of_a_checkpoint(
    workers: Workers, tmp_path: Path, layout: Layout, bucket_mib: int
) -> None:
    overrides = (
        f"parallel.world_size={layout.world_size}",
        f"parallel.tensor_model_parallel_size={layout.tp}",
        f"rollout.bucket_mib={bucket_mib}",
        "checkpoint.asynchronous=true",
    )
    config = load_config(QUICKSTART, overrides)
    parameters = count_parameters(config.model, config.parallel, vocab_size=VOCAB)
    said = host_needs(config, parameters, vocab_size=VOCAB, dtype=torch.float32)
    found = workers.run(layout, host_tasks.host_bytes, config, VOCAB, str(tmp_path))
    assert sum(rank["slots"] for rank in found) == pytest.approx(said.slots, abs=2 * 16384)
    assert sum(rank["copy"] for rank in found) == pytest.approx(said.checkpoint_copy, rel=0.02)
