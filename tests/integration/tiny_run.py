"""The real command line on a tiny task: data, recipes, runs and what a run must not leave behind.

Everything is made once a session in a temporary folder: a 512-piece tokenizer and datasets from a
few speeches, a judge (a random Llama of two layers with its own tokenizer), and, where a test
needs one, a pretrained policy. `TrainerRun` knows all processes of a run by a variable in their
environment and by descent, so a test can say that none is left.
"""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w

ROOT = Path(__file__).parents[2]
MARK = "MEGATRON_SIP_TEST_RUN"
PIECES = 512
JUDGE_SHAPE = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 128}
HEADS = {"num_attention_heads": 4, "num_query_groups": 2}  # vLLM on CPU: heads of 32 or more

NTP = {
    "run": {"task": "ntp", "steps": 6},
    "platform": {"kind": "cpu"},
    "model": {**JUDGE_SHAPE, **HEADS, "max_sequence_length": 64},
    "parallel": {"world_size": 2},
    "optimizer": {"lr": 2e-3, "warmup_steps": 1, "decay_style": "constant"},
    "data": {
        "prefix_tokens": 16,
        "min_prefix_tokens": 16,
        "suffix_tokens": 16,
        "global_batch_size": 4,
        "micro_batch_size": 1,
    },
    "objective": {"name": "nll", "prefix_weight": 1.0},
    "checkpoint": {"interval": 1000},
    "evaluation": {"num_prefixes": 4, "bootstrap": 100},
}
SERVER = {"kind": "start", "max_model_len": 2048, "num_threads": 1, "max_num_seqs": 16}
SIP = {
    **NTP,
    "run": {"task": "sip", "steps": 3},
    "optimizer": {"lr": 1e-3, "decay_style": "constant"},
    "servers": {"policy": {**SERVER, "model": "policy", "max_model_len": 64}, "judge": SERVER},
    "rollout": {
        "server": "policy",
        "num_rollouts": 3,
        "weight_transfer": "shared_memory",
        "max_logprob_mismatch": 1e-3,
    },
    "judge": {
        "criteria": [{"form": "likelihood", "name": "likelihood", "server": "judge"}],
        # a policy that has learned nothing writes any byte, again and again
        "guards": {"hidden_characters": False, "max_repeated": 1.0, "min_compressed": 0.0},
    },
    "rewriter": {"server": "judge", "prompt": "rewrite_v1", "max_tokens": 24},
    "objective": {"name": "dpo", "suffix_weight": 1.0},
    "curriculum": {"kind": "emergent", "sources": ["suffix", "rewrite", "rollout"]},
    "evaluation": {"num_prefixes": 4, "bootstrap": 100, "server": "judge"},
}


@dataclass
class Workplace:
    """Prepared data and the folder that runs of one session live in."""

    folder: Path
    judge: Path
    names: list[str] = field(default_factory=list)

    def data(self) -> dict[str, str]:
        paths = {s: str(self.folder / f"tiny_{s}") for s in ("train", "validation", "test")}
        return paths | {"tokenizer": str(self.folder / "tokenizer.model")}

    def recipe(self, base: dict[str, Any], name: str, **changes: Any) -> Path:
        """Write the recipe `base` of run NAME; changes are section__key=value."""
        tree = copy.deepcopy(base)
        tree["run"]["dir"] = str(self.folder / name)
        tree["data"] |= self.data()
        if tree["run"]["task"] == "sip":
            tree["servers"]["judge"]["model"] = str(self.judge)
            tree["judge"]["cache_dir"] = str(self.folder / f"{name}-cache")
        for key, value in changes.items():
            *sections, last = key.split("__")
            target = tree
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = value
        path = self.folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(tree))
        return path


class TrainerRun:
    """One `pretrain_sip.py` with all its processes; without torchrun it stops where ranks meet."""

    def __init__(
        self, recipe: Path, *arguments: str, num_ranks: int, torchrun: bool, max_restarts: int = 0
    ) -> None:
        self.mark, self.name = secrets.token_hex(8), recipe.stem
        self.run_dir = recipe.with_suffix("")
        self.temp_dir = Path(tempfile.mkdtemp(prefix="sip-", dir="/tmp"))  # socket paths are short
        script = [str(ROOT / "pretrain_sip.py"), "--config", str(recipe), *arguments]
        launcher = [sys.executable]
        if torchrun:
            launcher += ["-m", "torch.distributed.run", "--master-port", str(free_port())]
            launcher += ["--nproc-per-node", str(num_ranks), "--max-restarts", str(max_restarts)]
        env = os.environ | {
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temp_dir),
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
        }
        env.pop("WANDB_SERVICE", None)  # of a test in this process that used the library
        self.begun = time.monotonic()
        self.out = (recipe.parent / f"{self.name}.out").open("w+")
        self.err = (recipe.parent / f"{self.name}.err").open("w+")
        self.process = subprocess.Popen(
            [*launcher, *script],
            env=env,
            cwd=ROOT,
            stdout=self.out,
            stderr=self.err,
            start_new_session=True,
        )
        self.seen: set[psutil.Process] = set()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            self.look()
            time.sleep(0.3)

    def look(self) -> None:
        """Note all descendants of torchrun."""
        try:
            leader = psutil.Process(self.process.pid)
            self.seen |= {leader, *leader.children(recursive=True)}
        except psutil.NoSuchProcess:
            return

    def left(self) -> list[psutil.Process]:
        """Living processes of this run, zombies left out."""
        found = {p for p in self.seen if p.is_running()}
        needle = f"{MARK}={self.mark}".encode()
        for process in psutil.process_iter():
            try:
                environment = Path(f"/proc/{process.pid}/environ").read_bytes()
                command = " ".join(process.cmdline())
            except (OSError, psutil.Error):
                continue
            if needle in environment or str(self.run_dir) + "/" in command:
                found.add(process)
        return [p for p in found if _lives(p)]

    def wait(self, timeout_s: float = 400.0) -> TrainerRun:
        """Wait for the end; end everything and fail when it takes longer."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"not done after {timeout_s} s:\n{self.stderr()}") from None
        self.seconds = time.monotonic() - self.begun
        self._watcher.join()
        return self

    def end(self) -> None:
        """SIGKILL everything of this run that is left."""
        for process in self.left():
            with_suppressed(process.kill)
        self.process.wait(30)

    def stderr(self) -> str:
        return Path(self.err.name).read_text(errors="replace")

    def errors(self) -> list[str]:
        """The trainer's own error lines, without torchrun's."""
        return [line for line in self.stderr().splitlines() if line.startswith("error: ")]

    def metrics(self) -> list[dict[str, float]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def urls(self) -> list[int]:
        """Ports of the servers that were started."""
        ports = []
        for log in (self.run_dir / "logs").glob("*.log"):
            found = re.findall(r"127\.0\.0\.1:(\d+)", log.read_text(errors="replace"))
            ports += [int(port) for port in found]
        return sorted(set(ports))

    def assert_nothing_left(self, *, within_s: float) -> None:
        """No process, no listening port, no shared memory, no temporary folder."""
        deadline = time.monotonic() + within_s
        while left := self.left():
            assert time.monotonic() < deadline, f"left after {within_s} s: {left}"
            time.sleep(0.2)
        for port in self.urls():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        pids = "|".join(str(p.pid) for p in self.seen)
        ours = re.compile(rf"megatron_sip-({pids})-")
        assert not [p.name for p in Path("/dev/shm").iterdir() if ours.match(p.name)]
        assert not list(self.temp_dir.glob("megatron_sip-*"))


def with_suppressed(act: Any) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_tool(name: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


def make_workplace(folder: Path, texts: Mapping[str, str]) -> Workplace:
    """Tokenizer, datasets and judge in a folder, made by the real tools.

    Args: texts: documents by name.
    """
    (folder / "text").mkdir()
    for name, text in texts.items():
        (folder / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    found, tokenizer = str(folder / "text" / "*.txt"), str(folder / "tokenizer.model")
    run_tool(
        "train_tokenizer.py", "--input", found, "--vocab-size", str(PIECES), "--output", tokenizer
    )
    run_tool(
        "preprocess_data.py", "--input", found, "--tokenizer", tokenizer, "--output-prefix",
        str(folder / "tiny"), "--split", "train=60,validation=20,test=20",
    )  # fmt: skip
    return Workplace(folder, make_judge(folder / "judge"))


def make_judge(folder: Path, *, labels: tuple[str, ...] = ()) -> Path:
    """A random Llama with a small BPE tokenizer and a chat template.

    With `labels` it always finds these one-token words likeliest; which of them, the text decides.
    """
    import torch
    from judge_helpers import make_model_folder
    from safetensors.torch import save_file
    from tokenizers import Tokenizer

    from megatron_sip.config import Model
    from megatron_sip.convert.families import SpecialIds, describe
    from megatron_sip.convert.names import name_table

    make_model_folder(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    model = Model(**JUDGE_SHAPE, **HEADS, max_sequence_length=2048)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for entry in name_table(model, vocab_size=size):
        for name, shape in zip(entry.names, entry.shapes, strict=True):
            std = 0.3 if len(shape) > 1 else 0.0
            tensors[name] = std * torch.randn(shape, generator=generator) + (len(shape) == 1)
    if labels:
        tensors["model.embed_tokens.weight"][:, 0] = 20.0  # every hidden state points this way
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor[0] = 0.0  # and no layer turns it
        for label in labels:
            tensors["lm_head.weight"][tokenizer.token_to_id(label), 0] = 30.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = SpecialIds(eos=tokenizer.token_to_id("<|im_end|>"))
    description = describe(model, vocab_size=size, special=special, dtype="float32")
    (folder / "config.json").write_text(json.dumps(description))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
