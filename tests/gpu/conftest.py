"""One NCCL group of one rank for the folder; no test runs without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

for folder in ("distributed", "integration", "unit"):  # cases, recipes of tiny runs, pools
    sys.path.append(str(Path(__file__).parents[1] / folder))

import gpu_tasks  # noqa: E402 (the folders above)
import torch  # noqa: E402
from workers import Context  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if why := gpu_tasks.missing("gpu"):
        pytest.skip(why)


@pytest.fixture(scope="session")
def transformer_engine(_gpu: None) -> None:
    if why := gpu_tasks.missing("transformer_engine"):
        pytest.skip(why)


@pytest.fixture(scope="session")
def group(_gpu: None) -> Iterator[Context]:
    yield gpu_tasks.join(gpu_tasks.platform("local"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def context(group: Context) -> Callable[..., Context]:
    """The group with another platform: context(layers, fp8)."""

    def of(layers: str, fp8: str | None = None) -> Context:
        if layers != "local" and (why := gpu_tasks.missing("transformer_engine")):
            pytest.skip(why)
        return replace(group, platform=gpu_tasks.platform(layers, fp8))

    return of
