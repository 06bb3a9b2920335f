"""Rollouts from one or several vLLM servers: token ids in, token ids and log-probs out.

One request a prefix with n = K children; child k samples with seed + k. A prefix's server is a
function of its sample id alone, and its seed of (seed, step, sample): what is sampled does not
depend on who answers. The prefix cache is salted with the weights' version, and each reply says
which weights made it: a reply of another version, of two versions, or of an aborted request never
enters a pool.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np

from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import RunFailed
from megatron_sip.serving.client import Endpoint, HttpClient, run
from megatron_sip.types import Candidate, SipSample


class BadReply(RunFailed):
    """A rollout server answered what cannot be a rollout of the published weights."""

    server: str = ""
    """Who answered; "" where nobody did."""


def _refused(server: str, reason: str) -> BadReply:
    error = BadReply(f"{server}: {reason}")
    error.server = server
    return error


def derived_seed(*parts: int) -> int:
    """A 31-bit seed that is a function of its parts (seed, step, sample)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0]) >> 1


def home_of(sample_id: int, num_servers: int) -> int:
    """Which of the servers a prefix belongs to: always the same one, and all get as many."""
    return sample_id % num_servers


def policy_version_of(weight_version: str) -> int:
    """Policy version in "<policy version>-<digest>".

    Raises: BadReply for anything else, such as "default" of a server that was just started.
    """
    head, _, digest = weight_version.partition("-")
    if not head.isdigit() or not digest:
        raise BadReply(f"weights of version {weight_version!r} were never published by this run")
    return int(head)


class VllmEngine:
    """Generates with the weights that were last published on all of its servers."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        tokenizer: Tokenizer,
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        concurrency: int,
        timeout_s: float,
        vocab_size: int | None = None,
    ) -> None:
        """Args: vocab_size: ids that the policy knows; None: as many as the tokenizer has."""
        self.endpoints = tuple(endpoints)  # in the order of rollout.server; new after a restart
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        self._max_tokens, self._concurrency, self._timeout_s = max_tokens, concurrency, timeout_s
        self.weight_version = ""  # set by the weight exchange; "" while nothing is published
        self.seconds: dict[str, float] = {}  # of the last `generate`, to each server's last reply

    def generate(
        self, samples: Sequence[SipSample], num_rollouts: int, *, seed: int, step: int
    ) -> list[list[Candidate]]:
        """K rollouts of every prefix.

        Returns: for each sample K candidates in the order of their seeds.
        Raises:  BadReply if no weights are published, or a reply is malformed or was made by other
                 weights; RequestFailed if a server does not answer. Both name the server.
        """
        if not self.weight_version:
            raise BadReply("no weights are published on the rollout servers; exchange them first")
        homes = [home_of(sample.sample_id, len(self.endpoints)) for sample in samples]
        requests = [self._request(sample, num_rollouts, seed, step) for sample in samples]
        replies = asyncio.run(self._post(list(zip(homes, requests, strict=True))))
        return [
            self._candidates(sample, reply, num_rollouts, server=self.endpoints[home].name)
            for sample, reply, home in zip(samples, replies, homes, strict=True)
        ]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> dict[str, np.ndarray]:
        """The probe: what every server says of the same tokens with the published weights.

        Returns: by server's name the log-probs of token 1.. given those before, nats,
                 float32[len - 1].
        Raises:  as `generate`.
        """
        request = {
            "token_ids": [int(t) for t in token_ids],
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0},
            "cache_salt": self.weight_version,
        }
        replies = asyncio.run(self._post([(i, request) for i in range(len(self.endpoints))]))
        return {
            endpoint.name: self._prompt_logprobs(reply, token_ids, server=endpoint.name)
            for endpoint, reply in zip(self.endpoints, replies, strict=True)
        }

    async def _post(self, requests: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Replies to (place of a server, request), in order; the first failure is raised."""
        started, self.seconds = time.perf_counter(), {}
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(HttpClient(e, concurrency=self._concurrency))
                for e in self.endpoints
            ]

            async def post(client: HttpClient, request: dict[str, Any]) -> dict[str, Any]:
                reply = await client.post(
                    "/inference/v1/generate", request, deadline_s=self._timeout_s
                )
                self.seconds[client.endpoint.name] = time.perf_counter() - started
                return reply

            return await run(post(clients[home], request) for home, request in requests)

    def _prompt_logprobs(
        self, reply: dict[str, Any], token_ids: Sequence[int], *, server: str
    ) -> np.ndarray:
        try:
            (choice,) = reply["choices"]
            self._check_version(choice, server=server)
            entries = reply["prompt_logprobs"]
            values = [e[str(t)]["logprob"] for e, t in zip(entries[1:], token_ids[1:], strict=True)]
            return np.array(values, np.float32)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"malformed reply: {type(error).__name__} {error}"
            raise _refused(server, reason) from error

    def _check_version(self, choice: dict[str, Any], *, server: str) -> None:
        versions = {span["version"] for span in choice.get("weight_versions") or ()}
        if versions != {self.weight_version}:
            raise _refused(
                server,
                f"a rollout was made by weights {sorted(versions)}, but "
                f"{self.weight_version!r} were published; the server was restarted or updated by "
                "someone else",
            )

    def _request(self, sample: SipSample, k: int, seed: int, step: int) -> dict[str, Any]:
        sampling = self._sampling | {
            "n": k,
            "seed": derived_seed(seed, step, sample.sample_id),
            "logprobs": 0,
            "stop_token_ids": [self._tokenizer.eod],
        }
        return {
            "token_ids": sample.prefix_ids.tolist(),
            "sampling_params": sampling,
            "cache_salt": self.weight_version,
        }

    def _candidates(
        self, sample: SipSample, reply: dict[str, Any], k: int, *, server: str
    ) -> list[Candidate]:
        try:
            choices = sorted(reply["choices"], key=lambda c: c["index"])
            if [c["index"] for c in choices] != list(range(k)):
                raise _refused(server, f"asked for {k} rollouts, got {len(choices)}")
            return [self._candidate(sample, choice, server=server) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            reason = f"malformed reply: {type(error).__name__} {error}"
            raise _refused(server, reason) from error

    def _candidate(self, sample: SipSample, choice: dict[str, Any], *, server: str) -> Candidate:
        ids = np.array(choice["token_ids"], np.int32)
        content = choice["logprobs"]["content"]
        logprobs = np.array([entry["logprob"] for entry in content], np.float32)
        self._check_version(choice, server=server)
        if choice["finish_reason"] not in ("stop", "length"):
            raise _refused(server, f"a rollout ended by {choice['finish_reason']!r}")
        if [entry["token_id"] for entry in content] != ids.tolist():
            raise _refused(server, "log-probs do not belong to the returned tokens")
        if not 0 < len(ids) <= self._max_tokens or not all(map(math.isfinite, logprobs)):
            raise _refused(server, f"{len(ids)} tokens with log-probs {logprobs.tolist()}")
        _, text = self._tokenizer.continuation_text(
            sample.prefix_ids, ids, model_vocab_size=self._vocab_size
        )
        return Candidate(
            "rollout", ids, text, logprobs, policy_version_of(self.weight_version),
            choice["finish_reason"],
        )  # fmt: skip
