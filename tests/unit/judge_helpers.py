"""A scripted server, a tiny tokenizer folder and pools for tests of judge, rewriter and client."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_sip.judge.served_model import ServedModel
from megatron_sip.judge.text_model import JudgeTokenizer
from megatron_sip.serving.client import Endpoint
from megatron_sip.types import Candidate, CandidatePool, SipSample

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROP, HANG = "drop", "hang"
Answer = Callable[[str, dict[str, Any]], Any]


@contextmanager
def scripted_server(answer: Answer, *, model: str = "judge") -> Iterator[str]:
    """Yields the URL of a server in a thread.

    `answer(path, body)` gives the reply's JSON, or (status, headers, text), DROP or HANG.
    /v1/models says `model` and never reaches `answer`.
    """
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), []

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": model}]})
        body = json.loads(await request.text() or "{}")
        body["_authorization"] = request.headers.get("Authorization", "")
        result = answer(request.path, body)
        if inspect.isawaitable(result):
            result = await result
        if result == DROP:
            assert request.transport is not None
            request.transport.abort()
        if result == HANG:
            await asyncio.sleep(30)
        if isinstance(result, tuple):
            status, headers, text = result
            return web.Response(status=status, headers=headers, text=text)
        return web.Response(text=json.dumps(result), content_type="application/json")

    async def serve() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.append(runner.addresses[0][1])
        ready.set()
        return runner

    def work() -> None:
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def make_model_folder(folder: Path) -> Path:
    """A byte-level BPE tokenizer with special tokens, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Yes No Yes No the world of words goes on and on"] * 20, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def served(url: str, folder: Path, *, model: str = "judge", key: str = "") -> ServedModel:
    endpoint = Endpoint(name="j", url=url, model=model, api_key=key)
    return ServedModel(endpoint, JudgeTokenizer(folder), model_digest="digest")


def likelihood_reply(body: dict[str, Any], logprob: Any = -2.0) -> dict[str, Any]:
    """What a server says to prompt_logprobs: the same log-prob for each token but the first."""
    rows: list[Any] = [{str(t): {"logprob": logprob}} for t in body["prompt"]]
    return {"choices": [{"prompt_logprobs": [None, *rows[1:]]}]}


def labels_reply(logprobs: dict[int, Any]) -> dict[str, Any]:
    top = {f"token_id:{token}": value for token, value in logprobs.items()}
    return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}


def make_sample(sample_id: int = 0, *, num_prefix: int = 4, num_suffix: int = 8) -> SipSample:
    ids = np.arange(num_prefix + num_suffix, dtype=np.int32)
    return SipSample(sample_id, sample_id, num_prefix, ids[:num_prefix], ids[num_prefix:])


def make_pool(texts: list[str], *, prefix: str = "Once", sample_id: int = 0) -> CandidatePool:
    empty = np.zeros(0, dtype=np.float32)
    candidates = tuple(
        Candidate("rollout", np.arange(3, dtype=np.int32), text, empty, 0, "stop") for text in texts
    )
    return CandidatePool(make_sample(sample_id), prefix, candidates, 1.0)
