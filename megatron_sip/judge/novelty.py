"""How new the word pairs of a candidate are: the criterion that costs no question.

A likelihood prefers common phrases whatever was said before, and a policy that learns from it turns
to them: it loses diversity before it learns anything else. This is the expectation of what a text
adds to the distinct pairs of others, that is of distinct-2; unlike minus a log-frequency it has its
limit, so a pair that no one ever wrote earns no more than one that is merely uncommon.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sip.data.frequencies import PairFrequencies
from megatron_sip.types import Candidate


@dataclass(frozen=True)
class Novelty:
    """Expected share of a candidate's pairs of adjacent tokens that `pairs` others do not hold.

        mean over the candidate's pairs of (1 - f(pair)) ^ pairs

    with f(pair) the pair's share of the text that `frequencies` counts.

    Args: eod: end-of-document id, not counted: to end early is not to be new.
    """

    frequencies: PairFrequencies
    eod: int

    def score(self, candidate: Candidate, *, pairs: int) -> float | None:
        """In [0, 1]; None if the candidate has no pair."""
        token_ids = np.asarray(candidate.token_ids)
        share = self.frequencies.share(token_ids[token_ids != self.eod])
        return float(((1.0 - share) ** pairs).mean()) if share.size else None
