"""tools/dataset.py: its commands, its errors, its help and its output."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from maintenance_helpers import CORPUS, EOD, STARTS, VOCAB, alter, build, megatron_build

from megatron_sip.data.selection import contamination, mask_command
from megatron_sip.data.tokenizer import Tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "dataset.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    spec = importlib.util.spec_from_file_location("dataset_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dataset.py", *map(str, arguments)])
        code = module.main()
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    vocabulary = {"<|endoftext|>": EOD} | {f"w{i}": i for i in range(VOCAB) if i != EOD}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    model.add_special_tokens(["<|endoftext|>"])
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    return path


def test_the_tool_adopts_verifies_splits_merges_and_inspects(
    tmp_path: Path, tool: Any, tokenizer_file: Path
) -> None:
    megatron_build(tmp_path / "d_text_document", [[d] for d in CORPUS])
    tokenizer = ("--tokenizer", tokenizer_file)
    code, out, err = tool("adopt", tmp_path / "d", *tokenizer, "--min-tokens", 3)
    assert code == 0 and "d_text_document: 30 documents" in out and "each ends with eod 1" in out
    assert "30 documents" in err and "MB/s" in err
    d = tmp_path / "d_text_document"
    code, out, _ = tool("split", d, "--output-prefix", tmp_path / "p", "--split", "x=1,y=1")
    assert code == 0 and "p_x: " in out and "p_y: " in out
    salted = ("--output-prefix", tmp_path / "q", "--split", "x=1,y=1", "--salt", "other")
    assert tool("split", d, *salted)[0] == 0
    assert (tmp_path / "p_x.bin").read_bytes() != (tmp_path / "q_x.bin").read_bytes()
    code, out, _ = tool("merge", tmp_path / "p_*", "--output", tmp_path / "m", "--min-tokens", 4)
    assert code == 0 and "m: 30 documents" in out
    code, out, _ = tool("verify", tmp_path / "p_*", tmp_path / "m", *tokenizer)
    assert code == 0 and out.count(": whole, ") == 3
    code, out, err = tool("inspect", tmp_path / "m", *tokenizer, "--samples", 2, "--seed", 3)
    assert (code, err) == (0, "") and out.count("\ndocument ") == 2 and " w" in out
    code, out, _ = tool("inspect", tmp_path / "m", "--json", "--plot", tmp_path / "p.png")
    assert code == 0 and json.loads(out)["min_tokens"] == 4 and (tmp_path / "p.png").is_file()


def test_the_tool_tells_errors_on_stderr(tmp_path: Path, tool: Any, tokenizer_file: Path) -> None:
    build(tmp_path / "a", CORPUS)
    alter(tmp_path / "a.bin", STARTS[3])
    for arguments, message in (
        (("verify", tmp_path / "a"), "document 3 (bytes"),
        (("verify", tmp_path / "x*"), "check the pattern"),
        (("verify", tmp_path / "a", "--tokenizer", tokenizer_file), "another tokenizer"),
        (("merge", tmp_path / "a", "--output", tmp_path / "a"), "exists already"),
        (("split", tmp_path / "a", "--output-prefix", "b", "--split", "x"), "must be NAME=SHARE"),
        (("inspect", tmp_path / "none"), "cannot be read"),
        (("inspect", tmp_path / "a", "--samples", 2), "need the tokenizer"),
        (("inspect", tmp_path / "a", "--seed", 2), "--seed 2 has no effect without"),
        (("adopt", tmp_path / "a", "--tokenizer", "none", "--min-tokens", 1), "tokenizer none"),
    ):
        code, out, err = tool(*arguments)
        assert (code, out) == (1, "")
        last = err[err.rindex("error: ") :]
        assert message in last and "Traceback" not in err


MASK_ERRORS = {
    "--seed 3 --rules r": "--seed 3 has no effect without --near-duplicates; give that too",
    "--text-key q --rules r": "--text-key q has no effect without --decontaminate",
    "--ngram-words 7 --rules r": "--ngram-words 7 has no effect without --decontaminate",
    "--min-score 0.5 --rules r": "--min-score 0.5 has no effect without --judge",
    "--min-score 0 --rules r": "--min-score 0.0 has no effect without --judge",
    "--max-score 0.5 --rules r": "--max-score 0.5 has no effect without --judge",
    "--max-chars 10 --rules r": "--max-chars 10 has no effect without --judge",
    "--logs x --rules r": "--logs x has no effect without --judge",
    "--criterion c --rules r": "--judge and --criterion belong together",
    "--judge c": "--judge and --criterion belong together",
    "--text-key q --decontaminate a.txt b.txt": "--text-key q has no effect: all files of",
    "--ngram-words 0 --decontaminate {e}": "--ngram-words is 0, but a run has 1 word or more",
    "": "give one of --rules, --near-duplicates, --decontaminate and --judge",
}


@pytest.mark.parametrize("options", MASK_ERRORS)
def test_an_option_of_mask_without_effect_is_an_error(
    tmp_path: Path, tool: Any, tokenizer_file: Path, options: str
) -> None:
    digest = Tokenizer.load(tokenizer_file).digest
    build(tmp_path / "a", CORPUS, tokenizer_digest=digest)
    (tmp_path / "e.jsonl").write_text('{"text": "one two three"}')
    before = sorted(tmp_path.iterdir())
    given = options.format(e=tmp_path / "e.jsonl").split()
    mask = ("mask", tmp_path / "a", "--name", "m", "--tokenizer", tokenizer_file)
    code, out, err = tool(*mask, *given)
    assert (code, out) == (1, "") and f"error: {MASK_ERRORS[options]}" in err.replace(
        "error: contamination: ", "error: "
    )
    assert sorted(tmp_path.iterdir()) == before


def test_mask_looks_for_runs_of_any_length(tmp_path: Path, tool: Any, tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_file)
    build(tmp_path / "a", CORPUS, tokenizer_digest=tokenizer.digest, min_tokens=1)
    leak = max(CORPUS, key=len)[:-1]
    (tmp_path / "e.jsonl").write_text(json.dumps({"q": tokenizer.decode(leak)}))
    mask = ("mask", tmp_path / "a", "--name", "m", "--tokenizer", tokenizer_file)
    leaks = ("--decontaminate", tmp_path / "e.jsonl", "--text-key", "q")
    code, out, err = tool(*mask, *leaks, "--ngram-words", len(leak))
    assert code == 0, err
    assert "contamination: 1 left out" in out
    assert mask_command._SETTINGS["ngram_words"][0] == contamination.NGRAM_WORDS


@pytest.mark.parametrize(
    "command", ["inspect", "verify", "merge", "split", "adopt", "mask", "when", "where"]
)
def test_each_command_teaches_with_an_example(
    tool: Any, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool(command, "--help")
    assert stopped.value.code == 0
    out = capfd.readouterr().out
    assert "example: " in out and f"python tools/dataset.py {command} " in out


def test_the_tool_prints_any_character_anywhere_and_imports_no_torch(tmp_path: Path) -> None:
    build(tmp_path / "d", CORPUS)
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['dataset.py', 'inspect', {str(tmp_path / 'd')!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "finally:\n"
        "    import megatron_sip.data.maintenance.adopt, megatron_sip.data.maintenance.merge\n"
        "    import megatron_sip.data.maintenance.split, megatron_sip.data.maintenance.verify\n"
        "    assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, cwd=TOOL.parents[1]
    )
    assert found.returncode == 0, found.stderr.decode()
    assert b"\\u2588" in found.stdout
