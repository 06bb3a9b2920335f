"""How long a step of DPO takes with each layout of rows; printed, and compared with each other."""

from __future__ import annotations

import time
from collections.abc import Callable

import explain_tasks
import gpu_tasks
import pytest
import test_memory
import torch
from workers import Context

from megatron_sip.explain.flops import training_flops
from megatron_sip.explain.shapes import policy_shape

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("transformer_engine")]

WARM_UP, TIMED = 3, 5


def test_rows_that_share_a_prefix_are_faster_than_padded_ones(
    context: Callable[..., Context],
) -> None:
    ctx, seconds = context("transformer_engine"), {}
    for layout in ("padded", "shared_prefix"):
        config = test_memory.recipe("dpo, shared_prefix")
        objective = config.objective.model_copy(update={"row_layout": layout})
        config = config.model_copy(update={"objective": objective})
        learner = gpu_tasks.learner_of(ctx, config.model, test_memory.VOCAB, config.optimizer)
        reference = gpu_tasks.copy_of(ctx, learner.policy, config.model, test_memory.VOCAB)
        batches = explain_tasks.micro_batches(ctx, config, test_memory.VOCAB)
        for i in range(WARM_UP + TIMED):
            if i == WARM_UP:
                torch.cuda.synchronize()
                begun = time.perf_counter()
            learner.learn(batches, objective, reference=reference, version=0, fresh_reference=False)
        torch.cuda.synchronize()
        seconds[layout] = (time.perf_counter() - begun) / TIMED
        shape = policy_shape(config.model, vocab_size=test_memory.VOCAB)
        count, length = sum(len(b.tokens) for b in batches), batches[0].tokens.shape[1]
        flops = training_flops(shape, rows=count, length=length, causal_share=0.5) * 4 / 3
        print(f"{layout}: {count} rows of {length} tokens, {1e3 * seconds[layout]:.1f} ms a step, "
              f"{flops / seconds[layout] / 1e12:.0f} TFLOP/s with the reference")  # fmt: skip
    assert seconds["shared_prefix"] < seconds["padded"]
