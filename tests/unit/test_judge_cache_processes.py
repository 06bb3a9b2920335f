"""The cache with real processes: two at once, kills at any instant, damaged files."""

import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from megatron_sip.judge.cache import Cache, Paid
from megatron_sip.judge.cache_file import checksum
from megatron_sip.judge.cache_maintenance import merge, verify
from megatron_sip.judge.costs import cost_report

PAID = """
from megatron_sip.judge.cache import Cache, Paid
def paid(run):
    return Paid(kind="pairwise", criterion="coherence", prompt="p 1", model="m", vote=0,
                prompt_tokens=900, completion_tokens=1, seconds=0.25, run=run)
"""
ASKER = (
    PAID
    + """
import json, random, sys
from pathlib import Path
cache, run = Cache(Path(sys.argv[1])), sys.argv[2]
keys = [f"{i}" for i in range(300)]
random.Random(run).shuffle(keys)
asked = 0
print("ready", flush=True)
for line in sys.stdin:  # one call of the judge a line
    cache.refresh()
    for key in keys[: int(line)]:
        if cache.get(key) is None:
            asked += 1
            cache.put(key, {"v": int(key)}, paid(run))
    print(asked, flush=True)
assert all(cache.get(key) == {"v": int(key)} for key in keys)
cache.close()
"""
)
STORER = (
    PAID
    + """
import os, sys
from pathlib import Path
cache, run = Cache(Path(sys.argv[1])), sys.argv[2]
for i in range(10**6):
    key = f"{run}-{i}"
    cache.put(key, {"v": key, "text": "x" * (i % 40 * 150)}, paid(run))
    os.write(1, f"{key}\\n".encode())
"""
)
MERGER = """
import sys
from pathlib import Path
from megatron_sip.judge import cache_maintenance
print("ready", flush=True)
while cache_maintenance.merge(Path(sys.argv[1])) or True:
    pass
"""


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def call(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def answer(process):
    return int(process.stdout.readline())


def test_two_processes_ask_for_nothing_that_is_stored(tmp_path):
    one, two = start(ASKER, tmp_path, "one"), start(ASKER, tmp_path, "two")
    assert one.stdout.readline() == two.stdout.readline() == "ready\n"
    call(one, 150)
    assert answer(one) == 150
    call(two, 300)  # sees the 150 rows of a file that was made after its start
    assert answer(two) == 150
    call(one, 300)
    assert answer(one) == 150
    assert [p.communicate()[0] for p in (one, two)] == ["", ""]
    assert [p.returncode for p in (one, two)] == [0, 0]
    assert {row.run: row.questions for row in cost_report(tmp_path)} == {"one": 150, "two": 150}


def test_two_processes_at_the_same_time_agree_and_pay_for_little_twice(tmp_path):
    processes = [start(ASKER, tmp_path, run) for run in ("one", "two")]
    for process in processes:
        process.stdout.readline()
    for line in (1, 300):  # the first call makes both files, the second knows them
        for process in processes:
            call(process, line)
        counts = [answer(process) for process in processes]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert 300 <= sum(counts) < 400
    assert sum(row.questions for row in cost_report(tmp_path)) == sum(counts)
    assert merge(tmp_path).rows == sum(counts)


def test_what_was_told_as_stored_outlives_a_kill_at_any_instant(tmp_path):
    told, seed = [], random.Random(5)
    for i in range(20):
        process = start(STORER, tmp_path, f"run{i}")
        assert process.stdout is not None
        told.append(process.stdout.readline())
        time.sleep(seed.uniform(0, 0.15))
        process.kill()
        told += process.communicate()[0].splitlines()
    told = [key.strip() for key in told if key.strip()]
    assert len(told) > 1000, len(told)
    cache = Cache(tmp_path)
    assert [key for key in told if (cache.get(key) or {}).get("v") != key] == []
    cache.close()
    assert not list(tmp_path.glob("*.damaged")) and all(state.whole for state in verify(tmp_path))
    found = merge(tmp_path)
    assert found.files == 20 and not found.left and len(list(tmp_path.iterdir())) == 1
    cache = Cache(tmp_path)
    assert all(cache.get(key)["v"] == key for key in told)
    cache.close()


def test_a_merge_that_is_killed_loses_nothing(tmp_path):
    seed, keys = random.Random(7), []
    for i in range(6):
        for name in range(3):
            cache = Cache(tmp_path)
            for n in range(200):
                keys.append(f"{i}-{name}-{n}")
                cache.put(keys[-1], {"v": keys[-1]})
            cache.close()
        process = start(MERGER, tmp_path)
        process.stdout.readline()
        time.sleep(seed.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        cache = Cache(tmp_path)
        assert all(cache.get(key) == {"v": key} for key in keys)
        cache.close()
    assert merge(tmp_path).rows == len(keys) and len(list(tmp_path.iterdir())) == 1


def test_a_reader_and_merges_at_the_same_time_lose_no_row(tmp_path):
    process, keys = start(MERGER, tmp_path), []
    process.stdout.readline()
    reader, end = Cache(tmp_path), time.monotonic() + 1
    while time.monotonic() < end:
        cache = Cache(tmp_path)
        keys.append(f"{len(keys)}")
        cache.put(keys[-1], keys[-1])
        cache.close()
        reader.refresh()
        assert all(reader.get(key) == key for key in keys[-50:])
    process.kill()
    process.communicate()
    assert all(reader.get(key) == key for key in keys)
    reader.close()


def made(folder, rows):
    """A file with short and long values. Returns: (its path, values by key)."""
    cache = Cache(folder)
    values = {f"key {i}": "x" * (i % 7 * 900) + f"{i}" for i in range(rows)}
    for i, (key, value) in enumerate(values.items()):
        costs = Paid(
            kind="rewrite", criterion="", prompt="p 1", model="m", vote=0,
            prompt_tokens=i, completion_tokens=1, seconds=0.5, run="r",
        )  # fmt: skip
        cache.put(key, value, costs)
    cache.close()
    (path,) = folder.glob("*.sqlite")
    return path, values


def flip(data, seed):
    for _ in range(seed.choice([1, 2, 5, 50])):
        data[seed.randrange(len(data))] ^= 1 << seed.randrange(8)


def flip_header(data, seed):
    data[seed.randrange(512)] = seed.randrange(256)


def flip_values(data, seed):
    at = data.find(b"x" * 100, seed.randrange(len(data) // 2))
    data[at + seed.randrange(100)] ^= 1


def truncate(data, seed):
    del data[seed.randrange(len(data)) :]


def garbage_header(data, seed):
    size = seed.choice([16, 100, 4096])
    data[:size] = seed.randbytes(size)


def garbage_page(data, seed):
    at = seed.randrange(len(data) // 4096) * 4096
    data[at : at + 4096] = seed.randbytes(4096)


def sqlite_can_read(path):
    """Keys of the credible rows that SQLite alone gives."""
    connection, keys = sqlite3.connect(path), set()
    connection.text_factory = lambda data: data.decode(errors="replace")
    try:
        for key, value, digest in connection.execute("SELECT key, value, checksum FROM entries"):
            if isinstance(key, str) and isinstance(value, str) and digest == checksum(key, value):
                keys.add(key)
    except (sqlite3.DatabaseError, UnicodeDecodeError):  # of a message that quotes the schema
        pass
    connection.close()
    return keys


@pytest.mark.parametrize(
    "damage", [flip, flip_header, flip_values, truncate, garbage_header, garbage_page]
)
def test_damage_gives_no_wrong_value_and_loses_no_row_that_can_be_read(tmp_path, damage):
    (tmp_path / "whole").mkdir()
    path, values = made(tmp_path / "whole", 150)
    whole = path.read_bytes()
    kept = 0
    for i in range(40):
        data, seed = bytearray(whole), random.Random(f"{damage.__name__} {i}")
        damage(data, seed)
        copy = tmp_path / "copy"
        copy.write_bytes(data)
        readable = sqlite_can_read(copy)
        folder = tmp_path / f"{i}"
        folder.mkdir()
        (folder / path.name).write_bytes(data)
        cache = Cache(folder)
        found = {key: value for key in values if (value := cache.get(key)) is not None}
        assert found.items() <= values.items()
        assert readable <= found.keys()
        kept += len(found)
        for key, value in values.items():
            if key not in found:
                cache.put(key, value)
        cache.close()
        cache = Cache(folder)  # what was asked for again is not asked for a third time
        assert {key: cache.get(key) for key in values} == values
        cache.close()
    least = {"truncate": 0.4, "flip": 0.9}.get(damage.__name__, 0.98)
    assert kept >= least * 40 * len(values), kept / 40 / len(values)
