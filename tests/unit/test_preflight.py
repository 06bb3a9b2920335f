"""What the preflight says that needs more than one rank, a GPU or another node to happen."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip import preflight
from megatron_sip.config import Config
from megatron_sip.errors import refuse
from megatron_sip.recipe import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def said(config: Config, environment: dict[str, str]) -> str:
    with pytest.raises(ValueError) as caught:
        preflight.check(config, environment=environment)
    return str(caught.value)


@pytest.fixture
def cluster(tmp_path: Path) -> Config:
    """A recipe for GPUs whose rollout server takes devices 4 to 7."""
    return load_config(CONFIGS / "continual_quality.toml", (f"run.dir={tmp_path / 'run'}",))


@pytest.mark.parametrize(("ranks", "clash"), [("4", False), ("5", True), ("8", True)])
def test_a_server_on_the_ranks_gpus_is_refused(cluster: Config, ranks: str, clash: bool) -> None:
    world = str(cluster.parallel.world_size)
    text = said(cluster, {"RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": ranks})
    shared = [gpu for gpu in (4, 5, 6, 7) if gpu < int(ranks)]
    assert (f"servers.policy.gpus holds {shared}, which trainer ranks use" in text) == clash


def test_two_servers_on_one_gpu_are_refused() -> None:
    judge = '{ kind = "start", model = "m", max_model_len = 64, gpus = [3, 4] }'
    with pytest.raises(ValueError, match=r"servers\.judge\.gpus and servers\.policy\.gpus both"):
        load_config(CONFIGS / "continual_quality.toml", (f"servers.judge={judge}",))


def test_a_replay_does_not_look_at_servers(cluster: Config) -> None:
    with_servers = preflight.problems(cluster)
    without = preflight.problems(cluster, servers=False)
    assert set(without) < set(with_servers)
    assert any(m.startswith("servers.judge.") for m in with_servers)


def test_a_folder_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load_config(CONFIGS / "quickstart.toml", (f"run.dir={tmp_path}/file/run",))
    assert f"run.dir {tmp_path}/file/run: {tmp_path}/file is a file" in "\n".join(
        preflight.problems(config)
    )


def test_one_problem_is_told_alone_and_several_as_a_list() -> None:
    refuse([])
    with pytest.raises(ValueError, match=r"^a$"):
        refuse(["a"])
    with pytest.raises(ValueError, match=r"^2 things .* nothing was started:\n  - a\n  - b$"):
        refuse(["a", "b"])
