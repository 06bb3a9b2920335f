"""Nothing in data, pools, tokenizer or checkpoint is unpickled, run or imported: an audit hook saw.

A real run on one rank (`audited.py`) learns from hostile text: SIP from recorded pools, from a
checkpoint and with one written meanwhile; on demand also next-token pretraining and its evaluation.
Every event of the steps must stand below, with its reason.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import NTP, ROOT, SIP, free_port, run_tool

from megatron_sip import pool_store
from megatron_sip.pool_store import PoolRecord, commit_step, write_pools
from megatron_sip.types import Candidate, CandidatePool, Pick, PoolRewards, SipSample, Verdict
from megatron_sip.unpickling import METADATA

MARK = "sip_hostile_marker"
RAN = Path("/tmp") / f"megatron_sip-audited-{os.getpid()}"
STEPS, BATCH, VOCAB = 2, 2, 512


class Code:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {RAN} # {MARK}",)


PICKLED = pickle.dumps(Code())
HOSTILE = (
    f"__import__('os').system('touch {RAN}') # {MARK}",
    f"{{{{ cycler.__init__.__globals__.os.system('touch {RAN}') }}}} {MARK}",
    f"{{% for x in ().__class__.__base__.__subclasses__() %}}{{{{ x }}}}{{% endfor %}} {MARK}",
    f"!!python/object/apply:os.system ['touch {RAN}'] # {MARK}",
    f"import {MARK}; exec(open('{MARK}.py').read())",
    f'{{"vote": "A", "__class__": "os.system", "args": ["touch {RAN}"], "m": "{MARK}"}}',
    f"$(touch {RAN}) `touch {RAN}` ; touch {RAN} | sh # {MARK} \x00\x1b]0;x\x07",
    f"{base64.b64encode(PICKLED).decode()} {MARK}",
    PICKLED.decode("latin-1") + MARK,
    "../../../../etc/passwd file:///etc/passwd http://127.0.0.1:9/" + MARK,
)

PLACES = tuple(
    str(Path(path).resolve())
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_path(name))
)
PROGRAMS = (*PLACES, str(ROOT), "<frozen")

# (event, begin of what it was about, where the frame stands that caused it): why it may be
ALLOWED = {
    ("subprocess.Popen", "('uname', ['uname', '-p']", ""): "the processor, for environment.json",
    ("subprocess.Popen", "('git', ['git', '-C', ", ""): "the commit, for environment.json",
    ("import", "", ""): "a program, loaded when first needed: `check` looks where each one stands",
    ("exec", PROGRAMS, ""): "the same programs, and the report's own template",
    ("compile", PROGRAMS, ""): "the same",
    ("compile", "<string>: ", "/typing.py"): "an annotation of such a program",
    ("compile", "<string>: b'lambda _cls, ", "/collections/__init__.py"): "its named tuples",
    ("exec", "<string>", "/collections/__init__.py"): "the same",
    ("compile", "<string>: ", "/dataclasses.py"): "its data classes",
    ("exec", "<string>", "/dataclasses.py"): "the same",
}
BETWEEN_RANKS = METADATA | {  # what a rank tells others, where plans are made and metrics summed
    ("torch.distributed.checkpoint.planner", "LoadPlan"),
    ("torch.distributed.checkpoint.planner", "ReadItem"),
    ("torch.distributed.checkpoint.planner", "LoadItemType"),
    ("torch.distributed.checkpoint.storage", "WriteResult"),
    ("megatron.core.dist_checkpointing.mapping", "ShardedTensor"),
    ("megatron.core.dist_checkpointing.mapping", "ShardedObject"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


@pytest.fixture(scope="module")
def hostile_data(workplace: Any) -> dict[str, str]:
    """Datasets of hostile documents, made by the real tool."""
    folder = workplace.folder / "hostile"
    folder.mkdir()
    texts = [f"{number} {text} " * 9 for number in range(8) for text in HOSTILE]
    rows = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]
    (folder / "docs.jsonl").write_text("\n".join(rows))
    run_tool(
        "preprocess_data.py", "--input", str(folder / "docs.jsonl"),
        "--tokenizer", str(workplace.folder / "tokenizer.model"),
        "--output-prefix", str(folder / "hostile"), "--split", "train=60,validation=20,test=20",
    )  # fmt: skip
    return {split: str(folder / f"hostile_{split}") for split in ("train", "validation", "test")}


def record(step: int, position: int) -> PoolRecord:
    """A pool whose every text is hostile."""
    rng = np.random.default_rng(step * BATCH + position)
    text = HOSTILE[(step * BATCH + position) % len(HOSTILE)]

    def ids(n: int) -> np.ndarray:
        return rng.integers(5, VOCAB, n).astype(np.int32)

    none = np.zeros(0, np.float32)
    sample = SipSample(step * BATCH + position, 0, 16, ids(16), ids(16))
    candidates = (
        Candidate("suffix", sample.suffix_ids, text, none, -1, "data"),
        Candidate("rewrite", ids(8), text, none, -1, "stop"),
        Candidate("rollout", ids(6), text, -np.ones(6, np.float32), -5, text),
    )
    score = np.array([0.2, 0.9, 0.1], np.float32)
    valid = np.ones(3, bool)
    return PoolRecord(
        step,
        position,
        CandidatePool(sample, text, candidates, 1 / 3),
        PoolRewards({"likelihood": score}, score, valid, 0, valid),
        (Verdict("likelihood", 1, -1, 0, 0.9, text),),
        (Pick(1, "chosen", 0.0, 1.0), Pick(2, "rejected", 0.0, 1.0)),
    )


@pytest.fixture(scope="module")
def hostile_pools(workplace: Any) -> Path:
    """Committed pools of hostile text; one column says that it is a pickled Arrow type."""
    folder = workplace.folder / "hostile-run"
    (folder / "pools").mkdir(parents=True)
    for step in range(STEPS):
        records = [record(step, position) for position in range(BATCH)]
        write_pools(folder, step, dp_rank=0, records=records)
        path = folder / "pools" / f"step_{step:08d}.dp0.parquet"
        table = pq.read_table(path)
        field = pa.field("text", pa.string(), metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": PICKLED,
        })  # fmt: skip
        place = table.schema.get_field_index("text")
        metadata = (table.schema.metadata or {}) | {b"pandas": PICKLED}
        table = table.set_column(place, field, table["text"]).replace_schema_metadata(metadata)
        pq.write_table(table, path)
        commit_step(folder, step, num_shards=1)
    assert pool_store.num_committed(folder / "pools") == STEPS
    return folder / "pools"


def audited(workplace: Any, recipe: Path, *arguments: str) -> dict[str, Any]:
    events = recipe.with_suffix(".events.json")
    script = Path(__file__).with_name("audited.py")
    environment = os.environ | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(events), MARK, "--config", str(recipe), *arguments]
    done = subprocess.run(
        command, env=environment, cwd=workplace.folder, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return json.loads(events.read_text())


def is_allowed(event: str, detail: str, caller: str) -> bool:
    if "MARKED" in detail:  # hostile text in it
        return False
    if event == "pickle.find_class":
        if "torch/distributed/distributed_c10d.py" in caller:
            return ast.literal_eval(detail) in BETWEEN_RANKS
        return "megatron_sip/unpickling.py" in caller and ast.literal_eval(detail) in METADATA
    return any(
        event == name and detail.startswith(begin) and where in caller
        for name, begin, where in ALLOWED
    )


def check(found: dict[str, Any]) -> None:
    """Nothing but what is allowed, and no module from anywhere but where programs are."""
    assert not RAN.exists()
    assert not [m for m in found["modules"] if not str(Path(m).resolve()).startswith(PROGRAMS)]
    unknown = [tuple(e) for e in found["events"] if not is_allowed(*e[1:])]
    assert not unknown, "\n".join(map(str, dict.fromkeys(unknown)))
    assert any(event[1] == "pickle.find_class" for event in found["events"])  # the hook works


def test_a_run_on_hostile_pools_runs_nothing_of_them(
    workplace: Any, pretrained: Any, hostile_data: dict[str, str], hostile_pools: Path
) -> None:
    recipe = workplace.recipe(
        SIP, "audited-sip",
        run__steps=STEPS,
        model__init={"kind": "megatron", "path": str(pretrained.run_dir)},
        parallel__world_size=1,
        data__train=hostile_data["train"],
        data__validation=hostile_data["validation"],
        data__test=hostile_data["test"],
        data__global_batch_size=BATCH,
        checkpoint__interval=1,
        checkpoint__asynchronous=True,
    )  # fmt: skip
    check(audited(workplace, recipe, "--pools", str(hostile_pools)))


@pytest.mark.full
def test_pretraining_on_hostile_documents_runs_nothing_of_them(
    workplace: Any, hostile_data: dict[str, str]
) -> None:
    recipe = workplace.recipe(
        NTP, "audited-ntp",
        parallel__world_size=1,
        data__train=hostile_data["train"],
        data__validation=hostile_data["validation"],
        data__test=hostile_data["test"],
        checkpoint__interval=2,
    )  # fmt: skip
    check(audited(workplace, recipe))
