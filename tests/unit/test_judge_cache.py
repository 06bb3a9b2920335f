import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.judge.cache import Cache, Paid, content_key
from megatron_sip.judge.cache_file import SCHEMAS, create_file, open_file
from megatron_sip.judge.cache_folder import WriterLock
from megatron_sip.judge.cache_maintenance import merge, verify

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
        "[c.execute('INSERT INTO entries (key, value, checksum, stored_unix_s)'"
        " ' VALUES (?, ?, 0, 0)', (str(i), 'x' * 3000))"
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
    with pytest.raises(ValueError, match=r"old\.sqlite has cache schema version 7.*reads 2"):
        Cache(tmp_path)


def test_a_file_that_is_no_cache_is_set_aside_and_an_empty_one_is_passed_over(tmp_path, caplog):
    (tmp_path / "a.sqlite").touch()
    Cache(tmp_path).close()
    (tmp_path / "b.sqlite").write_text("hello" * 1000)
    Cache(tmp_path).close()
    assert "b.sqlite is damaged (file is not a database): 0 rows saved" in caplog.text
    assert {p.name for p in tmp_path.iterdir()} == {"a.sqlite", "b.sqlite.damaged"}


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
        maker = threading.Thread(target=lambda path=path: create_file(path).close())
        maker.start()
        while not path.exists():
            pass
        while (found := open_file(path, check=False)) is None:
            pass
        found.close()
        maker.join()


PAID = Paid(
    kind="pairwise", criterion="coherence", prompt="coherence 1", model="m", vote=2,
    prompt_tokens=900, completion_tokens=1, seconds=0.25, run="runs/a",
)  # fmt: skip


def only_file(folder):
    (path,) = folder.glob("*.sqlite")
    return path


def rows_of(path):
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    rows = [dict(row) for row in connection.execute("SELECT * FROM entries ORDER BY rowid")]
    connection.close()
    return rows


def version_1(path, entries):
    connection = sqlite3.connect(path)
    connection.execute(SCHEMAS[1])
    connection.executemany("INSERT INTO entries VALUES (?, ?)", entries)
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()


def test_what_an_answer_cost_stands_in_named_columns(tmp_path):
    cache = Cache(tmp_path)
    before = time.time()
    cache.put("a", 0.75, PAID)
    cache.put("b", "text")
    first, second = rows_of(only_file(tmp_path))
    assert before <= first.pop("stored_unix_s") <= time.time()
    del first["checksum"]
    assert first == {
        "key": "a", "value": "0.75", "kind": "pairwise", "criterion": "coherence",
        "prompt": "coherence 1", "model": "m", "vote": 2, "prompt_tokens": 900,
        "completion_tokens": 1, "latency_s": 0.25, "run": "runs/a",
    }  # fmt: skip
    assert second["kind"] is None and second["latency_s"] is None
    cache.close()


def test_a_second_payment_of_a_key_is_kept_and_changes_no_answer(tmp_path):
    cache = Cache(tmp_path)
    cache.put("a", 1, PAID)
    cache.put("a", 2, PAID)
    assert [row["value"] for row in rows_of(only_file(tmp_path))] == ["1", "2"]
    assert cache.get("a") == 1
    cache.close()


def test_a_file_of_version_1_is_read_as_it_is(tmp_path):
    path = tmp_path / "old.sqlite"
    version_1(path, [("a", "0.5"), ("b", '{"v": 1}'), ("c", "no json")])
    before = path.read_bytes()
    cache = Cache(tmp_path)
    assert [cache.get(k) for k in "abcd"] == [0.5, {"v": 1}, None, None]
    assert cache.num_damaged == 1
    cache.close()
    assert path.read_bytes() == before


def test_a_changed_value_is_a_miss_and_can_be_stored_anew(tmp_path, caplog):
    cache = Cache(tmp_path)
    cache.put("a", 0.125, PAID)
    cache.close()
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"0.125", b"0.925"))
    cache = Cache(tmp_path)
    assert cache.get("a") is None and cache.num_damaged == 1 and "key a is damaged" in caplog.text
    cache.put("a", 0.125, PAID)
    assert cache.get("a") == 0.125
    cache.close()


def test_a_new_file_is_seen_after_refresh_and_its_new_rows_at_once(tmp_path):
    one, two = Cache(tmp_path), Cache(tmp_path)
    one.put("a", 1)
    assert two.get("a") is None
    two.refresh()
    assert two.get("a") == 1
    one.put("b", 2)
    assert two.get("b") == 2
    one.close()
    two.close()


def test_an_own_file_that_was_damaged_meanwhile_is_replaced(tmp_path, caplog):
    cache = Cache(tmp_path)
    for i in range(200):
        cache.put(f"{i}", i, PAID)
    path = only_file(tmp_path)
    with path.open("r+b") as stream:
        stream.write(b"\xff" * 4096)
    cache.put("new", 1)
    assert [cache.get(f"{i}") for i in range(200)] == list(range(200)) and cache.get("new") == 1
    assert only_file(tmp_path) != path and (tmp_path / f"{path.name}.damaged").exists()
    assert "200 rows saved" in caplog.text
    cache.close()


def test_a_damaged_file_of_a_living_process_is_saved_and_left(tmp_path):
    live = writer(tmp_path, "a", 60)
    live.stdout.readline()
    path = only_file(tmp_path)
    with path.open("r+b") as stream:
        stream.write(b"\0" * 4096)
    cache = Cache(tmp_path)
    assert cache.get("a") == {"v": 0.5} and path.exists()
    cache.refresh()
    live.kill()
    live.wait()
    cache.close()
    Cache(tmp_path).close()
    assert not path.exists() and (tmp_path / f"{path.name}.damaged").exists()


def test_long_values_are_saved_from_a_damaged_file_with_their_costs(tmp_path):
    cache = Cache(tmp_path)
    values = {f"{i}": "x" * (i * 211) for i in range(120)}  # up to six overflow pages
    for key, value in values.items():
        cache.put(key, value, PAID)
    cache.close()
    path = only_file(tmp_path)
    before = rows_of(path)
    path.write_bytes(b"junk" * 1024 + path.read_bytes()[4096:])
    cache = Cache(tmp_path)
    assert {key: cache.get(key) for key in values} == values
    cache.close()
    assert sorted(map(repr, rows_of(only_file(tmp_path)))) == sorted(map(repr, before))


def test_a_merge_keeps_all_rows_and_the_files_in_use(tmp_path):
    caches = [Cache(tmp_path) for _ in range(3)]
    for i, cache in enumerate(caches):
        cache.put("both", i, PAID)
        cache.put(f"{i}", i, PAID)
    caches[2].refresh()
    version_1(tmp_path / "old.sqlite", [("o", "5")])
    caches[0].close()
    caches[1].close()
    found = merge(tmp_path)
    assert (found.files, found.rows, len(found.left), found.set_aside) == (3, 5, 1, ())
    assert len(list(tmp_path.glob("*.sqlite"))) == 2  # merged, live
    assert [caches[2].get(k) for k in ("0", "1", "o")] == [0, 1, None]
    caches[2].refresh()
    assert caches[2].get("o") == 5 and len(caches[2]._others) == 1
    caches[2].close()
    merge(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and merge(tmp_path).merged is None
    assert len(rows_of(only_file(tmp_path))) == 7


def test_a_merge_may_leave_out_what_was_stored_first(tmp_path):
    cache = Cache(tmp_path)
    for number in range(20):
        cache.put(f"{number:064d}", "x" * 998)  # 1000 bytes of JSON
    cache.close()
    assert merge(tmp_path, max_bytes=7 * 1064 + 10).rows == 7
    left = Cache(tmp_path)
    assert [n for n in range(20) if left.get(f"{n:064d}") is not None] == list(range(13, 20))
    left.close()
    assert only_file(tmp_path).stat().st_size < 28_000  # of 42,000
    assert merge(tmp_path, max_bytes=0).rows == 0


def test_a_merge_leaves_other_hosts_unless_told_and_sets_damaged_files_aside(tmp_path):
    version_1(tmp_path / "elsewhere-12-00112233.sqlite", [("a", "1")])
    version_1(tmp_path / "b.sqlite", [("b", "2")])
    data = (tmp_path / "b.sqlite").read_bytes()
    (tmp_path / "b.sqlite").write_bytes(b"\0" * 4096 + data[4096:])
    found = merge(tmp_path)
    assert (found.files, found.rows, len(found.left)) == (1, 1, 1)
    assert [p.name for p in found.set_aside] == ["b.sqlite.damaged"]
    assert merge(tmp_path, other_hosts=True).rows == 2
    lock = WriterLock(tmp_path / "elsewhere-13-00112233.v2.sqlite")
    create_file(tmp_path / "elsewhere-13-00112233.v2.sqlite").close()
    assert len(merge(tmp_path, other_hosts=True).left) == 1
    lock.release()


def test_verify_counts_damaged_rows_by_file(tmp_path):
    cache = Cache(tmp_path)
    for i in range(50):
        cache.put(f"{i}", f"value {i:02}", PAID)
    assert [(s.rows, s.whole, s.written) for s in verify(tmp_path)] == [(50, True, True)]
    cache.close()
    path = only_file(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"value 07", b"value 08"))
    (state,) = verify(tmp_path)
    assert (state.rows, state.damaged_rows, state.problem, state.written) == (49, 1, "", False)
    path.write_bytes(b"\0" * 100 + data[100:])
    (state,) = verify(tmp_path)
    assert (state.rows, state.whole) == (50, False) and "not a database" in state.problem


def test_a_full_disk_is_an_error_and_no_damage(tmp_path):
    cache = Cache(tmp_path)
    cache.put("a", 1)
    assert cache._own is not None
    cache._own._connection.execute("PRAGMA max_page_count = 5")
    with pytest.raises(OSError, match=r"cannot be stored \(database or disk is full"):
        cache.put("b", "x" * 20000)
    cache.put("c", 3)
    assert [cache.get(k) for k in "abc"] == [1, None, 3]
    assert not list(tmp_path.glob("*.damaged"))
    cache.close()
