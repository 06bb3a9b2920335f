import asyncio
import time

import pytest
from judge_helpers import DROP, HANG, scripted_server

from megatron_sip.serving import client as client_module
from megatron_sip.serving.client import (
    Endpoint,
    HttpClient,
    RequestFailed,
    check_served_model,
    run,
)


def script(*results):
    """Answers in order, then the last one again; `.calls` counts."""

    def answer(path, body):
        answer.calls += 1
        answer.bodies.append(body)
        return results[min(answer.calls, len(results)) - 1]

    answer.calls, answer.bodies = 0, []
    return answer


def ask(url, *, deadline_s=5.0, key="", path="/x", num=1, concurrency=4):
    async def work():
        endpoint = Endpoint(name="j", url=url, model="judge", api_key=key)
        async with HttpClient(endpoint, concurrency=concurrency) as client:
            jobs = (client.post(path, {"a": 1}, deadline_s=deadline_s) for _ in range(num))
            return await run(jobs), client.num_retries

    return asyncio.run(work())


def error(code, **headers):
    return (code, headers, f"status {code}")


@pytest.mark.parametrize("failure", [error(500), error(408), error(503), DROP])
def test_what_may_heal_is_tried_again(failure):
    answer = script(failure, {"ok": 1})
    with scripted_server(answer) as url:
        assert ask(url) == ([{"ok": 1}], 1)
    assert answer.calls == 2


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_a_client_error_fails_at_once_with_its_reason(code):
    answer = script(error(code))
    with scripted_server(answer) as url, pytest.raises(RequestFailed, match=f"status {code}") as e:
        ask(url)
    assert (answer.calls, e.value.status, e.value.server) == (1, code, "j")


def test_retry_after_is_honoured():
    answer = script((429, {"Retry-After": "1"}, ""), {"ok": 1})
    with scripted_server(answer) as url:
        start = time.monotonic()
        ask(url)
        assert time.monotonic() - start >= 1.0


def test_a_wait_beyond_the_deadline_fails_at_once():
    answer = script((429, {"Retry-After": "60"}, "busy"))
    with scripted_server(answer) as url, pytest.raises(RequestFailed) as e:
        start = time.monotonic()
        ask(url, deadline_s=3.0)
    assert time.monotonic() - start < 2.0
    assert e.value.status == 429


def test_the_deadline_covers_all_attempts_and_names_the_last_failure():
    answer = script(error(500), HANG)
    with scripted_server(answer) as url, pytest.raises(RequestFailed) as e:
        start = time.monotonic()
        ask(url, deadline_s=1.5)
    assert 1.0 < time.monotonic() - start < 3.0
    assert "deadline of 1.5 s" in e.value.reason and "status 500" in e.value.reason


def test_a_server_that_is_not_there_is_a_typed_failure():
    with pytest.raises(RequestFailed) as e:
        ask("http://127.0.0.1:9", deadline_s=0.6)
    assert e.value.status == 0


@pytest.mark.parametrize("text", ["not json", "[1]", "3", "[" * 100_000])
def test_a_reply_that_is_no_json_object_fails_once(text):
    answer = script((200, {}, text))
    with scripted_server(answer) as url, pytest.raises(RequestFailed, match="not"):
        ask(url)
    assert answer.calls == 1


def test_an_empty_body_is_an_empty_object():
    with scripted_server(script((200, {}, ""))) as url:
        assert ask(url)[0] == [{}]


def test_redirects_are_not_followed():
    answer = script((307, {"Location": "/elsewhere"}, ""))
    with scripted_server(answer) as url, pytest.raises(RequestFailed) as e:
        ask(url)
    assert (answer.calls, e.value.status) == (1, 307)


def test_a_reply_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(client_module, "MAX_REPLY_BYTES", 1000)
    answer = script({"a": "x" * 2000})
    with scripted_server(answer) as url, pytest.raises(RequestFailed, match="longer than 1000"):
        ask(url)
    assert answer.calls == 1


def test_the_key_is_sent_and_never_told():
    answer = script((401, {}, "wrong key s3cret"))
    with scripted_server(answer) as url, pytest.raises(RequestFailed) as e:
        ask(url, key="s3cret")
    assert answer.bodies[0]["_authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(e.value)
    assert "s3cret" not in repr(Endpoint(name="j", url=url, model="m", api_key="s3cret"))


def test_concurrency_is_bounded_and_waiting_costs_no_deadline():
    now, peaks = [0], []

    async def answer(path, body):
        now[0] += 1
        peaks.append(now[0])
        await asyncio.sleep(0.2)
        now[0] -= 1
        return {"ok": 1}

    with scripted_server(answer) as url:
        assert len(ask(url, num=8, concurrency=2, deadline_s=0.6)[0]) == 8
    assert max(peaks) == 2


def test_run_cancels_the_rest_at_the_first_failure():
    ended = []

    async def bad():
        raise KeyError("x")

    async def slow():
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(1)

    async def work():
        with pytest.raises(KeyError):
            await run([slow(), bad()])

    asyncio.run(work())
    assert ended == [1]


def test_another_model_is_refused_by_name():
    async def work(url):
        endpoint = Endpoint(name="j", url=url, model="judge")
        async with HttpClient(endpoint, concurrency=1) as client:
            await check_served_model(client, "judge", deadline_s=5)
            with pytest.raises(ValueError, match="server j serves judge but recipe names other"):
                await check_served_model(client, "other", deadline_s=5)

    with scripted_server(script({})) as url:
        asyncio.run(work(url))


@pytest.mark.parametrize(
    "url", ["ftp://h", "http://u:p4ss@h", "http://h/v1", "http://h?x=1", "h:80", "http://"]
)
def test_an_odd_url_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match=r"servers\.j") as e:
        Endpoint(name="j", url=url, model="m")
    assert "p4ss" not in str(e.value)
