"""How rare the word pairs of a candidate are: the criterion that costs no question.

A likelihood prefers common phrases whatever was said before, and a policy that learns from it turns
to them: it loses diversity before it learns anything else. What a likelihood has beyond the
frequency of the phrases is what the prefix explains (cf. pointwise mutual information).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sip.data.frequencies import PairFrequencies
from megatron_sip.types import Candidate


@dataclass(frozen=True)
class Rarity:
    """Minus the mean log-frequency of a candidate's pairs of adjacent tokens.

    Args: frequencies: of the pairs of a text.
          eod: end-of-document id, not counted: to end early is not to be rare.
    """

    frequencies: PairFrequencies
    eod: int

    def score(self, candidate: Candidate) -> float | None:
        """Nats a pair, >= 0; None if the candidate has no pair."""
        token_ids = np.asarray(candidate.token_ids)
        log_share = self.frequencies.log_share(token_ids[token_ids != self.eod])
        return -float(log_share.mean()) if log_share.size else None
