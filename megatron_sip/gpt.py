"""Megatron-Core's GPTModel with our loss head.

Written for megatron-core 0.16.1 and, by reading, for main: both call `_postprocess` with keywords,
and what we do not use is handed on as it came. Import it where a model is built: it imports
Megatron-Core, which what only reads recipes can do without.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_sip.config_model import RopeScaling
from megatron_sip.loss_head import label_logprobs, label_logprobs_and_entropy

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class SipGPTModel(GPTModel):
    """GPTModel that computes the NLL of given labels without keeping logits."""

    _with_entropy = False  # wish of the forward pass that is under way
    unpadded_vocab_size: int | None = None  # rows from here on are padding; None: there is none

    def scale_rope(self, scaling: RopeScaling) -> None:
        """Slow the long waves of the rotary embedding down, as Llama 3.1 does.

        With wave length l = 2 pi / f, context c and s = (c / l - low) / (high - low):
            f' = f where l < c / high,  f / factor where l > c / low,
            f' = (1 - s) f / factor + s f between
        """
        frequency = self.rotary_pos_emb.inv_freq
        kept = (
            scaling.original_max_position_embeddings * frequency / (2 * math.pi)
            - scaling.low_freq_factor
        ) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        self.rotary_pos_emb.inv_freq = frequency * ((1 - kept) / scaling.factor + kept)

    def forward(self, *args: Any, with_entropy: bool = False, **kwargs: Any) -> Output:
        """GPTModel's forward, but for what it returns on the last stage when labels are given.

        Args:    with_entropy: return the entropy of the same distributions, too.
        Returns: there float32[b, s]: minus the log-probs of the labels, nats; or that and the
                 entropy, float32[b, s], nats, without gradient.
        """
        self._with_entropy = with_entropy
        return super().forward(*args, **kwargs)

    def _postprocess(
        self, *, hidden_states: torch.Tensor, labels: torch.Tensor | None, **kwargs: Any
    ) -> Output:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
        group = self.pg_collection.tp
        if self.config.sequence_parallel:  # hidden_states is [s / TP, b, h]
            hidden = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        tied = self.share_embeddings_and_output_weights
        weight: Any = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        head = label_logprobs_and_entropy if self._with_entropy else label_logprobs
        found = head(
            hidden.flatten(0, 1), weight, labels.t().flatten(), group=group,
            vocab_size=self.unpadded_vocab_size,
        )  # fmt: skip

        def rows(of_tokens: torch.Tensor) -> torch.Tensor:  # [s b] -> [b, s]
            return of_tokens.view(*labels.t().shape).t().contiguous()

        if isinstance(found, tuple):
            return rows(-found[0]), rows(found[1])
        return rows(-found)
