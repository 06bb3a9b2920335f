"""Rollouts from a vLLM server: token ids in, token ids and log-probs out.

One request a prefix with n = K children; child k samples with seed + k. The prefix cache is salted
with the weights' version, and each reply says which weights made it: a reply of another version,
of two versions, or of an aborted request never enters a pool.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import RunFailed
from megatron_sip.serving.client import Endpoint, HttpClient
from megatron_sip.types import Candidate, SipSample


class BadReply(RunFailed):
    """A rollout server answered what cannot be a rollout of the published weights."""


def derived_seed(*parts: int) -> int:
    """A 31-bit seed that is a function of its parts (seed, step, sample)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0]) >> 1


def policy_version_of(weight_version: str) -> int:
    """Policy version in "<policy version>-<digest>".

    Raises: BadReply for anything else, such as "default" of a server that was just started.
    """
    head, _, digest = weight_version.partition("-")
    if not head.isdigit() or not digest:
        raise BadReply(f"weights of version {weight_version!r} were never published by this run")
    return int(head)


class VllmEngine:
    """Generates with the weights that were last published."""

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: Tokenizer,
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        concurrency: int,
        timeout_s: float,
    ) -> None:
        self._endpoint, self._tokenizer = endpoint, tokenizer
        self._sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        self._max_tokens, self._concurrency, self._timeout_s = max_tokens, concurrency, timeout_s
        self.weight_version = ""  # set by the weight exchange

    def generate(
        self, samples: Sequence[SipSample], num_rollouts: int, *, seed: int, step: int
    ) -> list[list[Candidate]]:
        """K rollouts of every prefix.

        Returns: for each sample K candidates in the order of their seeds.
        Raises:  BadReply if a reply is malformed or was made by other weights.
        """

        async def everything() -> list[dict[str, Any]]:
            async with HttpClient(self._endpoint, concurrency=self._concurrency) as client:
                return await asyncio.gather(
                    *(
                        client.post(
                            "/inference/v1/generate",
                            self._request(sample, num_rollouts, seed, step),
                            deadline_s=self._timeout_s,
                        )
                        for sample in samples
                    )
                )

        replies = asyncio.run(everything())
        return [
            self._candidates(sample, reply, num_rollouts)
            for sample, reply in zip(samples, replies, strict=True)
        ]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """Log-probs of token 1.. given the tokens before, nats, float32[len - 1] (the probe)."""
        request = {
            "token_ids": [int(t) for t in token_ids],
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0},
        }

        async def ask() -> dict[str, Any]:
            async with HttpClient(self._endpoint, concurrency=1) as client:
                return await client.post(
                    "/inference/v1/generate", request, deadline_s=self._timeout_s
                )

        entries = asyncio.run(ask())["prompt_logprobs"]
        values = [e[str(t)]["logprob"] for e, t in zip(entries[1:], token_ids[1:], strict=True)]
        return np.array(values, np.float32)

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

    def _candidates(self, sample: SipSample, reply: dict[str, Any], k: int) -> list[Candidate]:
        name = self._endpoint.name
        try:
            choices = sorted(reply["choices"], key=lambda c: c["index"])
            if [c["index"] for c in choices] != list(range(k)):
                raise BadReply(f"{name}: asked for {k} rollouts, got {len(choices)}")
            return [self._candidate(sample, choice) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise BadReply(f"{name}: malformed reply: {type(error).__name__} {error}") from error

    def _candidate(self, sample: SipSample, choice: dict[str, Any]) -> Candidate:
        name = self._endpoint.name
        ids = np.array(choice["token_ids"], np.int32)
        content = choice["logprobs"]["content"]
        logprobs = np.array([entry["logprob"] for entry in content], np.float32)
        versions = {span["version"] for span in choice.get("weight_versions") or ()}
        if versions != {self.weight_version}:
            raise BadReply(
                f"{name}: a rollout was made by weights {sorted(versions)}, but "
                f"{self.weight_version!r} were published; the server was restarted or updated by "
                "someone else"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            raise BadReply(f"{name}: a rollout ended by {choice['finish_reason']!r}")
        if [entry["token_id"] for entry in content] != ids.tolist():
            raise BadReply(f"{name}: log-probs do not belong to the returned tokens")
        if not 0 < len(ids) <= self._max_tokens or not all(map(math.isfinite, logprobs)):
            raise BadReply(f"{name}: {len(ids)} tokens with log-probs {logprobs.tolist()}")
        _, text = self._tokenizer.continuation_text(sample.prefix_ids, ids)
        return Candidate(
            "rollout", ids, text, logprobs, policy_version_of(self.weight_version),
            choice["finish_reason"],
        )  # fmt: skip
