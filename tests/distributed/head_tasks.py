"""The loss head of a real last stage, alone: hidden states in, log-probs and gradients out."""

from __future__ import annotations

from dataclasses import dataclass

import cases
import numpy as np
import torch
from tasks import module_with_weights
from workers import Context

from megatron_sip import loss_head

ROWS, LENGTH = 3, 8


@dataclass(frozen=True)
class Head:
    """Of one rank."""

    nll: np.ndarray  # [R, S]
    entropy: np.ndarray  # [R, S]
    hidden: np.ndarray  # [S, R, H], or this rank's part of S under sequence parallelism
    grad_hidden: np.ndarray  # of the same shape
    weight: np.ndarray  # [V / TP, H]
    grad_weight: np.ndarray  # [V / TP, H]
    logits: np.ndarray  # [R, S, V / TP], by Megatron-Core


def upstream() -> torch.Tensor:
    """[R, S] gradients of the NLL, some of them 0."""
    found = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(4))
    return found.where(found.abs() > 0.3, 0.0)


def labels() -> torch.Tensor:
    """int64[R, S], first and last row of either slice among them."""
    found = torch.randint(
        0, cases.VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5)
    )
    half = cases.VOCAB // 2
    found[0, :4] = torch.tensor([0, half - 1, half, cases.VOCAB - 1])
    return found


def head(ctx: Context, tied: bool, sequence_parallel: bool) -> Head:
    """What `_postprocess` makes of random hidden states, in blocks that divide nothing."""
    loss_head.BLOCKS["cpu"] = (5, 48)
    config, module = module_with_weights(ctx, cases.tiny_model(tied=tied), seed=1)
    weight = module.embedding.word_embeddings.weight if tied else module.output_layer.weight
    hidden = torch.randn(
        LENGTH, ROWS, config.hidden_size, generator=torch.Generator().manual_seed(3)
    )
    if sequence_parallel:
        config.sequence_parallel = True
        hidden = hidden.chunk(config.tensor_model_parallel_size)[ctx.ranks.tp_rank].clone()
    hidden.requires_grad_()
    unused = dict.fromkeys(
        ("input_ids", "position_ids", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin")
    )
    module._with_entropy = True
    nll, entropy = module._postprocess(hidden_states=hidden, labels=labels(), **unused)
    nll.backward(upstream())
    config.sequence_parallel = False
    logits = module._postprocess(hidden_states=hidden, labels=None, **unused)
    parts = (nll, entropy, hidden, hidden.grad, weight, weight.grad, logits)
    return Head(*(part.detach().numpy() for part in parts))
