"""How rare the words of a candidate are: the criterion that costs no question. Pure.

A likelihood prefers common words whatever was said before, and a policy that learns from it turns
to them. The likelihood's advantage over word frequency is what the prefix explains: with w = 1,
mean log p(candidate | prefix) - mean log p(its tokens), their pointwise mutual information.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sip.types import Candidate


@dataclass(frozen=True)
class Rarity:
    """Minus the mean log-frequency of a candidate's tokens.

    Args: log_frequency_V: float64[V], natural log of each token's share in a text.
          eod: end-of-document id, not counted: to end early is not to be rare.
    """

    log_frequency_V: np.ndarray
    eod: int

    def score(self, candidate: Candidate) -> float | None:
        """Nats a token, >= 0; None if the candidate has no token but `eod`."""
        token_ids = np.asarray(candidate.token_ids)
        token_ids = token_ids[token_ids != self.eod]
        return -float(self.log_frequency_V[token_ids].mean()) if token_ids.size else None
