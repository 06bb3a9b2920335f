"""Wrong inputs, one a case: what is changed, in a folder where everything else is right.

`test_wrong_inputs.py` runs each of them on the real command line; `docs/errors.md` is made of what
they said. Paths are relative to the folder, so that messages are the same on every machine.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from tiny_run import NTP, SIP, run_tool

RECIPE = "recipe.toml"


@dataclass(frozen=True)
class Case:
    """One wrong input of a run on one rank."""

    what: str
    """For the table, such as "misspelt key"."""
    overrides: tuple[str, ...] = ()
    """--set SECTION.KEY=VALUE."""
    prepare: Callable[[Path], None] | None = None
    """Spoils files in the folder; under names that no other case uses."""
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    recipe: str = RECIPE
    task: str = "sip"
    quick: bool = True
    """Found without torch: within 5 s of the start, whatever else the machine does."""


def base_recipe(task: str) -> dict[str, Any]:
    """A recipe that would run, on one rank, in the folder that `prepare_folder` makes."""
    tree = copy.deepcopy(SIP if task == "sip" else NTP)
    tree["run"]["dir"] = "runs/new"
    tree["parallel"]["world_size"] = 1
    tree["data"] |= {split: f"tiny_{split}" for split in ("train", "validation", "test")}
    tree["data"]["tokenizer"] = "tokenizer.model"
    if task == "sip":
        tree["servers"]["judge"]["model"] = "judge"
        tree["judge"]["cache_dir"] = "cache"
    return tree


def write_recipe(folder: Path, case: Case) -> None:
    if case.recipe == RECIPE:
        (folder / RECIPE).write_text(tomli_w.dumps(base_recipe(case.task)))


def _copy_data(folder: Path, name: str) -> Path:
    for suffix in (".bin", ".idx", ".eligible", ".manifest.json"):
        shutil.copy(folder / f"tiny_train{suffix}", folder / f"{name}{suffix}")
    return folder / name


def _truncated(folder: Path) -> None:
    path = _copy_data(folder, "cut").with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:1000])


def _without_index(folder: Path) -> None:
    _copy_data(folder, "noindex").with_suffix(".idx").unlink()


def _altered_index(folder: Path) -> None:
    path = _copy_data(folder, "altered").with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _short_texts(folder: Path) -> None:
    (folder / "short.txt").write_text("Thank you.")
    run_tool(
        "preprocess_data.py", "--input", str(folder / "short.txt"), "--tokenizer",
        str(folder / "tokenizer.model"), "--output-prefix", str(folder / "short_texts"),
    )  # fmt: skip


def _other_tokenizer(folder: Path) -> None:
    from megatron_sip.data.tokenizer_training import train_tokenizer

    words = iter(["a few other words and letters " * 50])
    train_tokenizer(words, vocab_size=280, output=folder / "other.model")


def _judge(name: str, spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    """A copy of the judge's folder, spoiled."""

    def prepare(folder: Path) -> None:
        shutil.copytree(folder / "judge", folder / name)
        spoil(folder / name)

    return prepare


def _set_config(**values: Any) -> Callable[[Path], None]:
    def spoil(judge: Path) -> None:
        path = judge / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def _with_code(judge: Path) -> None:
    (judge / "modeling.py").write_text("raise SystemExit('executed')\n")


def _megatrons(folder: Path) -> None:
    (folder / "megatron" / "iter_0000100").mkdir(parents=True)
    (folder / "megatron" / "latest_checkpointed_iteration.txt").write_text("100")


def _used(folder: Path) -> None:
    (folder / "runs" / "used").mkdir(parents=True)
    (folder / "runs" / "used" / "notes.txt").touch()


def _held(folder: Path) -> None:
    from megatron_sip.supervision.run_lock import hold

    hold(folder / "runs" / "held")


def _stopped(name: str, **files: str) -> Callable[[Path], None]:
    """A run directory with its recipe and `files`."""

    def prepare(folder: Path) -> None:
        from megatron_sip.recipe import load_config

        run_dir = folder / "runs" / name
        (run_dir / "checkpoints").mkdir(parents=True)
        recipe = load_config(folder / RECIPE, (f"run.dir=runs/{name}",))
        saved = tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
        (run_dir / "config.toml").write_text(saved)
        for path, content in files.items():
            (run_dir / path.replace("__", "/").replace("_json", ".json")).write_text(content)

    return prepare


def _other_checkpoint(folder: Path) -> None:
    from megatron_sip import checkpoint_files
    from megatron_sip.config import Model

    model = Model.model_validate_json(json.dumps(base_recipe("sip")["model"] | {"num_layers": 4}))
    (folder / "deeper").mkdir()
    identity = checkpoint_files.model_identity(model, vocab_size=512, tokenizer_digest="")
    checkpoint_files.write_manifest(folder / "deeper", identity)


CONNECT = '{ kind = "connect", url = "%s", model = "m", tokenizer = "judge"%s }'
REMOTE = CONNECT % ("http://judge:8000", "")
LOUD = CONNECT % ("http://user:secret@127.0.0.1:8000", "")
KEYLESS = CONNECT % ("http://judge:8000", ', api_key_env = "JUDGE_API_KEY"')
PAIRWISE = '[{ form = "pairwise", name = "quality", server = "judge", prompt = "%s" }]'
INIT = '{ kind = "megatron", path = "%s" }'

RECIPES = (
    Case("no such recipe", recipe="nothing.toml"),
    Case("not TOML", recipe="broken.toml",
         prepare=lambda f: (f / "broken.toml").write_text("[run\n") and None),
    Case("misspelt key", ("optimizer.learning_rate=1e-4",)),
    Case("misspelt section", ("optimiser.lr=1e-4",)),
    Case("a word for a number", ("optimizer.lr=fast",)),
    Case("a number out of range", ("rollout.top_p=1.5",)),
    Case("a choice that is none", ("curriculum.kind=emergant",)),
    Case("key missing", ("model={}",)),
    Case("--set without a value", ("optimizer.lr",)),
    Case("heads do not divide the width", ("model.num_attention_heads=3",)),
    Case("TP does not divide KV groups",
         ("parallel.tensor_model_parallel_size=4", "parallel.world_size=4")),
    Case("PP does not divide layers",
         ("parallel.pipeline_model_parallel_size=3", "parallel.world_size=3")),
    Case("TP x PP does not divide ranks",
         ("parallel.tensor_model_parallel_size=2", "parallel.world_size=3")),
    Case("batch does not split", ("data.micro_batch_size=3",)),
    Case("prefix and suffix longer than the model", ("data.prefix_tokens=60",)),
    Case("warm-up longer than the run", ("optimizer.warmup_steps=3",)),
    Case("FP8 on a CPU", ("platform.fp8={}",)),
    Case("head size that vLLM lacks",
         ("model.num_attention_heads=32", "model.num_query_groups=32")),
    Case("criterion of an unknown server",
         ('judge.criteria=[{ form = "likelihood", name = "a", server = "jugde" }]',)),
    Case("pairs of a source that no pool has",
         ('curriculum.sources=["suffix", "rewrite"]', 'objective.pair_sources=["rollout"]')),
    Case("GRPO at another temperature", ('objective={ name = "grpo" }', "rollout.temperature=0.7")),
    Case("GRPO of one rollout", ('objective={ name = "grpo" }', "rollout.num_rollouts=1")),
    Case("more pairs than rollouts", ('objective={ name = "dpo_rewrite", pairs_per_pool = 4 }',)),
    Case("reference that nothing is compared with",
         ('objective={ name = "simpo" }', 'reference={ kind = "frozen" }')),
    Case("reference of a KL without weight",
         ('objective={ name = "grpo" }', 'reference={ kind = "snapshot", interval = 2 }')),
    Case("engine as reference of what it did not make", ('reference={ kind = "rollout" }',)),
    Case("rewriter that nobody uses", ('curriculum.sources=["suffix", "rollout"]',)),
    Case("NCCL on a CPU", ("rollout.weight_transfer=nccl",)),
    Case("server too short for a row", ("servers.policy.max_model_len=16",)),
    Case("GPUs on a CPU", ("servers.judge.gpus=[0]",)),
    Case("policy served by another server", ("servers.judge.model=policy",)),
    Case("remote server without a key", (f"servers.judge={REMOTE}",)),
    Case("password in a URL", (f"servers.judge={LOUD}",)),
    Case("key variable empty", (f"servers.judge={KEYLESS}",)),
)  # fmt: skip
FILES = (
    Case("another number of ranks", environment=(("WORLD_SIZE", "2"),)),
    Case("no torchrun", environment=(("RANK", ""),)),
    Case("run folder in use", ("run.dir=runs/used",), prepare=_used),
    Case("run folder of a run that goes on", ("run.dir=runs/held",), prepare=_held),
    Case("run folder is a file", ("run.dir=tokenizer.model",)),
    Case("tokenizer missing", ("data.tokenizer=gone.model",)),
    Case("tokenizer of another kind", ("data.tokenizer=judge/tokenizer.json",)),
    Case("data missing", ("data.train=gone",)),
    Case("truncated .bin", ("data.train=cut",), prepare=_truncated),
    Case(".idx missing", ("data.train=noindex",), prepare=_without_index),
    Case("altered .idx", ("data.train=altered",), prepare=_altered_index),
    Case("no document is long enough", ("data.train=short_texts",), task="ntp",
         prepare=_short_texts),
    Case("a blend's parts measured differently", (
        'data.train=[{prefix="tiny_train", weight=1.0}, {prefix="tiny_test", epochs=2.0}]',)),
    Case("a mask that is not there", (
        'data.train=[{prefix="tiny_train", weight=1.0, mask="safe"}]',)),
    Case("data of another tokenizer", ("data.tokenizer=other.model",), prepare=_other_tokenizer),
    Case("first weights missing", (f"model.init={INIT % 'runs/gone'}",)),
    Case("first weights of Megatron-LM", (f"model.init={INIT % 'megatron'}",), prepare=_megatrons),
    Case("first weights of another shape", (f"model.init={INIT % 'deeper'}",),
         prepare=_other_checkpoint),
    Case("judge missing", ("servers.judge.model=gone",)),
    Case("judge with code", ("servers.judge.model=code",), prepare=_judge("code", _with_code)),
    Case("judge with code elsewhere", ("servers.judge.model=automap",),
         prepare=_judge("automap", _set_config(auto_map={"AutoModel": "x--y.Z"}))),
    Case("judge with pickled weights", ("servers.judge.model=pickled",),
         prepare=_judge("pickled", lambda j: (j / "pytorch_model.bin").touch())),
    Case("judge without weights", ("servers.judge.model=bare",),
         prepare=_judge("bare", lambda j: (j / "model.safetensors").unlink())),
    Case("judge with a shorter context", ("servers.judge.model=short",),
         prepare=_judge("short", _set_config(max_position_embeddings=1024))),
    Case("unknown prompt", (f"judge.criteria={PAIRWISE % 'quality_v9'}",)),
    Case("prompt of another form", (f"judge.criteria={PAIRWISE % 'safety_pointwise_v1'}",)),
    Case("replay of nothing", arguments=("--pools", "runs/gone/pools")),
    Case("resume without a run", ("run.dir=runs/none",), arguments=("--resume",)),
    Case("resume without a checkpoint", ("run.dir=runs/early",), arguments=("--resume",),
         prepare=_stopped("early")),
    Case("resume of a finished run", ("run.dir=runs/done",), arguments=("--resume",),
         prepare=_stopped("done", checkpoints__latest="step_00000003", summary_json="{}")),
    Case("resume with another recipe", ("run.dir=runs/half", "run.seed=2", "objective.beta=0.2"),
         arguments=("--resume",), prepare=_stopped("half", checkpoints__latest="step_00000002")),
    Case("several at once", ("data.train=gone", "servers.judge.model=gone", "run.dir=judge")),
)  # fmt: skip
SIZES = (
    Case("judge's questions too long", ("servers.judge.max_model_len=20",), quick=False),
    Case("too little memory", ("model.num_layers=200000", "rollout.bucket_mib=1"), quick=False),
    Case("too little disk", quick=False, overrides=(
        "run.steps=3000000", "checkpoint.interval=1", "checkpoint.keep_last=3000000")),
)  # fmt: skip
CASES = (*RECIPES, *FILES, *SIZES)
