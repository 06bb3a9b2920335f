"""A server that answers label questions after a fixed time and does nothing else.

python -m megatron_sip.benchmark.judge_stub LATENCY_S SPREAD_S LABEL_ID LABEL_ID

It prints its port and ends when its standard input does. A reply comes LATENCY_S to LATENCY_S +
SPREAD_S after the request, drawn evenly. The probability that it gives the first label is a digest
of the request's bytes, so every verdict shows which request it answers.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from aiohttp import web

MODEL = "stub"


@contextmanager
def judge_stub(labels: Sequence[int], *, latency_s: float, spread_s: float = 0.0) -> Iterator[str]:
    """Yields the URL of such a server, a process of its own."""
    numbers = [latency_s, spread_s, *labels]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_sip.benchmark.judge_stub", *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def reply(body: bytes, labels: Sequence[int]) -> bytes:
    """The answer to a request for one of two labels."""
    first = (zlib.crc32(body) + 0.5) / 2**32
    logprobs = {
        f"token_id:{labels[0]}": math.log(first),
        f"token_id:{labels[1]}": math.log1p(-first),
    }
    return json.dumps({"choices": [{"logprobs": {"top_logprobs": [logprobs]}}]}).encode()


async def serve(latency_s: float, spread_s: float, labels: Sequence[int]) -> None:
    """Serve until standard input ends."""

    async def answer(request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": MODEL}]})
        await asyncio.sleep(latency_s + spread_s * random.random())
        return web.Response(body=reply(body, labels), content_type="application/json")

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    stdin = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    await stdin.read()
    await runner.cleanup()


if __name__ == "__main__":
    latency, spread, *ids = sys.argv[1:]
    asyncio.run(serve(float(latency), float(spread), [int(label) for label in ids]))
