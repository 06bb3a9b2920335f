import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.judge import cache as cache_module
from megatron_sip.judge.cache import Cache, content_key

WRITER = """
import os, sys, time
from pathlib import Path
from megatron_sip.judge.cache import Cache
cache = Cache(Path(sys.argv[1]))
cache.put(sys.argv[2], {"v": 0.5})
print("stored", flush=True)
time.sleep(float(sys.argv[3]))
"""


def writer(folder, key, sleep_s):
    command = [sys.executable, "-c", WRITER, str(folder), key, str(sleep_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_stored_value_survives_a_kill_of_its_writer(tmp_path):
    process = writer(tmp_path, "a", 60)
    assert process.stdout.readline() == "stored\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    cache = Cache(tmp_path)
    assert cache.get("a") == {"v": 0.5}
    cache.close()


def test_files_of_live_and_finished_processes_are_read_together(tmp_path):
    done, live = writer(tmp_path, "a", 0), writer(tmp_path, "b", 60)
    assert done.wait() == 0
    live.stdout.readline()
    cache = Cache(tmp_path)
    cache.put("c", 1)
    assert [cache.get(k) for k in "abcd"] == [{"v": 0.5}, {"v": 0.5}, 1, None]
    assert len(list(tmp_path.glob("*.sqlite"))) == 3
    live.kill()
    live.wait()
    cache.close()


def test_a_transaction_cut_in_half_is_rolled_back_by_the_reader(tmp_path):
    cache = Cache(tmp_path)
    cache.put("a", 1)
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN');"
        "[c.execute('INSERT INTO entries VALUES (?, ?)', (str(i), 'x' * 3000))"
        " for i in range(200)]; os.kill(os.getpid(), 9)"
    )
    (path,) = tmp_path.glob("*.sqlite")
    cache.close()
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert next(tmp_path.glob("*-journal")).stat().st_size > 0
    cache = Cache(tmp_path)
    assert (cache.get("a"), cache.get("5")) == (1, None)
    cache.close()


def test_the_first_value_of_a_key_stays(tmp_path):
    cache = Cache(tmp_path)
    cache.put("a", 1)
    cache.put("a", 2)
    assert cache.get("a") == 1
    cache.close()


def test_nothing_is_written_before_the_first_value(tmp_path):
    Cache(tmp_path).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, float("nan"), {"a": float("inf")}])
def test_a_missing_or_odd_value_is_never_stored(tmp_path, value):
    cache = Cache(tmp_path)
    with pytest.raises(ValueError):
        cache.put("a", value)
    cache.close()


def test_another_schema_version_is_named(tmp_path):
    connection = sqlite3.connect(tmp_path / "old.sqlite")
    connection.execute("CREATE TABLE entries (key TEXT)")
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(ValueError, match=r"old\.sqlite has cache schema version 7.*reads 1"):
        Cache(tmp_path)


def test_a_file_that_is_no_cache_is_named_and_an_empty_one_is_passed_over(tmp_path):
    (tmp_path / "a.sqlite").touch()
    Cache(tmp_path).close()
    (tmp_path / "b.sqlite").write_text("hello" * 1000)
    with pytest.raises(ValueError, match=r"b\.sqlite cannot be read"):
        Cache(tmp_path)


def test_a_reader_does_not_change_another_process_file(tmp_path):
    cache = Cache(tmp_path)
    cache.put("a", 1)
    cache.close()
    (path,) = tmp_path.glob("*.sqlite")
    before = path.read_bytes()
    other = Cache(tmp_path)
    other.put("b", 2)
    other.close()
    assert path.read_bytes() == before


@given(st.dictionaries(st.text(), st.integers() | st.text(), min_size=1))
def test_the_key_depends_on_content_not_on_order(parts):
    backwards = dict(reversed(parts.items()))
    assert content_key(parts) == content_key(backwards)
    assert content_key(parts) != content_key({**parts, "vote!": 1, "\0": 2})


def test_a_file_that_is_just_being_made_is_not_taken_for_one_of_another_schema(tmp_path):
    for i in range(200):  # without one transaction for both reads a twelfth of them failed
        path = tmp_path / f"{i}.sqlite"
        maker = threading.Thread(target=lambda path=path: cache_module._create(path).close())
        maker.start()
        while not path.exists():
            pass
        while (found := cache_module._open_existing(path)) is None:
            pass
        found.close()
        maker.join()
