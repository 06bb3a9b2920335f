"""Tasks to worker processes: outcomes in order, and a worker's death at any place is seen."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import pytest

from megatron_sip.data.preprocess.worker_pool import WorkerDiedError, WorkerPool

LARGE = 1 << 22  # much more than a pipe holds
_STARTED: list[str] = []


def remember(word):
    _STARTED.append(word)


def answer(number, payload=b""):
    return number, _STARTED, payload


def fail(word):
    raise ValueError(word)


def unpicklable():
    return lambda: 1


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_within_the_answer():
    def half(link, data, **_):
        os.write(link.fileno(), data[: len(data) // 2] if len(data) > 100 else data)
        if len(data) > 100:  # not its length, which goes ahead
            die()

    Connection._send = half
    return b"x" * LARGE


class Broken:
    """Cannot be unpickled by who gets it as an answer."""

    def __reduce__(self):
        return fail, ("no such thing",)


@pytest.fixture
def pool():
    made = WorkerPool(2, multiprocessing.get_context("forkserver"), remember, "started")
    yield made
    made.close()
    assert not multiprocessing.active_children()


def test_tasks_and_answers_larger_than_a_pipe(pool):
    waiting = [pool.submit(answer, n, b"x" * LARGE) for n in range(9)]
    for number, future in enumerate(waiting):
        assert future.result(timeout=60) == (number, ["started"], b"x" * LARGE)


def test_an_error_keeps_its_class_and_says_where_it_was_raised(pool):
    with pytest.raises(ValueError, match="bad record") as raised:
        pool.submit(fail, "bad record").result(timeout=60)
    assert str(raised.value) == "bad record"
    assert "in fail\n" in raised.value.__notes__[0]
    assert pool.submit(answer, 1).result(timeout=60)[0] == 1


def test_what_cannot_be_pickled_is_an_error_of_its_task(pool):
    with pytest.raises(Exception, match="pickle"):
        pool.submit(lambda: 1).result(timeout=60)
    with pytest.raises(ValueError, match="no such thing"):
        pool.submit(Broken).result(timeout=60)
    with pytest.raises(Exception, match="pickle"):
        pool.submit(unpicklable).result(timeout=60)
    assert [pool.submit(answer, n).result(timeout=60)[0] for n in range(9)] == list(range(9))


@pytest.mark.parametrize("how", [die, die_within_the_answer])
def test_a_worker_that_dies_fails_its_tasks_while_another_lives(pool, how):
    waiting = [pool.submit(time.sleep, 1.0), pool.submit(how)]
    waiting += [pool.submit(answer, n, b"x" * LARGE) for n in range(20)]
    began = time.monotonic()
    outcomes = [future.exception(timeout=60) for future in waiting]
    assert time.monotonic() - began < 30
    assert outcomes[0] is None  # of the other worker
    assert isinstance(outcomes[1], WorkerDiedError)


def test_closing_ends_workers_amid_their_tasks():
    pool = WorkerPool(2, multiprocessing.get_context("forkserver"), remember, "started")
    waiting = [pool.submit(time.sleep, 600) for _ in range(9)]
    waiting.append(pool.submit(answer, 1, b"x" * LARGE))
    time.sleep(0.2)
    pool.close()
    assert not multiprocessing.active_children()
    assert sum(future.done() for future in waiting) <= 4
