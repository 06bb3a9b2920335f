"""Tensor bytes that a trainer rank holds, by what they are for. Pure.

Counted: tensors whose size follows from the recipe. Not counted: the process itself (PyTorch,
CUDA context, NCCL), temporary tensors inside an operation, buffer padding (under 0.1 %), and
Transformer Engine's FP8 copies of weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_sip.config import Config, Fp8
from megatron_sip.config_objective import reference_kind
from megatron_sip.explain.parameters import Parameters
from megatron_sip.explain.shapes import Shape
from megatron_sip.explain.workload import Workload

FP32 = 4
HEAD_BYTES = 24  # a token: its label's row and four sums of the softmax, by loss_head.py
NCCL_BUFFERS = 2  # packed_num_buffers of rollout/weight_transfer.py


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of one pipeline stage."""

    stage: int
    weights: int
    gradients: int
    """Whole on every rank: Megatron's distributed optimizer shards its own state only."""
    optimizer: int
    """Adam's two moments, and fp32 weights where training is in bf16; a data-parallel share."""
    start_policy: int
    """Frozen copy of the first weights: second scorer of the evaluation, and reference."""
    reference: int
    """A second frozen copy, taken later; 0 where the start policy or the engine serves."""
    activations: int
    """Kept for the backward pass by all micro-batches in flight, at the most."""
    exchange: int
    """Pieces of weights in flight, on rank 0 only."""

    @property
    def steady(self) -> int:
        """What is held all the time: weights, gradients, optimizer state, frozen copies."""
        return self.weights + self.gradients + self.optimizer + self.start_policy + self.reference

    @property
    def total(self) -> int:
        return self.steady + self.activations + self.exchange


def weight_bytes(kind: str, fp8: Fp8 | None = None) -> int:
    """Bytes of one weight in the model: fp32 on the CPU; bf16, or FP8 where kept so, on CUDA."""
    if kind == "cpu":
        return FP32
    return 1 if fp8 is not None and fp8.param else 2


def takes_reference_later(config: Config) -> bool:
    """Whether the reference is, or becomes, a copy of other weights than the start policy's."""
    kind = reference_kind(config.reference, config.objective)
    if kind == "snapshot":
        return True
    staged = config.curriculum is not None and config.curriculum.kind == "staged"
    return staged and kind == "frozen"


def rank_memory(
    config: Config, parameters: Parameters, workload: Workload, shape: Shape
) -> tuple[Memory, ...]:
    """Memory of a rank of each pipeline stage; stage 0 is shown as rank 0, which also sends.

    Args: workload: of the stage of the curriculum with the most rows.
    """
    size = weight_bytes(config.platform.kind, config.platform.fp8)
    moments = 2 * FP32 + (FP32 if config.platform.kind == "cuda" else 0)
    dp, ep = config.parallel.data_parallel_size, config.parallel.expert_model_parallel_size
    sip = config.run.task == "sip"
    stages = []
    for stage, parts in enumerate(parameters.per_rank):
        count = sum(parts.values())
        weights = count * size
        of_experts = -(-parts["experts"] * ep // dp)  # their copies are on dp / ep ranks
        share = -(-(count - parts["experts"]) // dp) + of_experts
        stages.append(
            Memory(
                stage=stage,
                weights=weights,
                gradients=count * FP32,
                optimizer=share * moments,
                start_policy=weights if sip else 0,
                reference=weights if takes_reference_later(config) else 0,
                activations=activation_bytes(config, workload, shape, stage=stage),
                exchange=0,
            )
        )
    stages[0] = replace(stages[0], exchange=exchange_bytes(config, shape))
    return tuple(stages)


def activation_bytes(config: Config, workload: Workload, shape: Shape, *, stage: int) -> int:
    """Bytes that autograd keeps on a rank of one stage.

    Each layer keeps, in elements a token (h hidden, q and k query and key widths, f MLP width,
    a heads, d their size, S row length, / TP for what is split):

        local layers (CPU):          6h + 4d + (4q + a + 5f) / TP
        Transformer Engine (CUDA):   4h + (3q + 3k + 3f) / TP    (flash attention, not measured)
        with e experts a token:      e (h + f / TP) more, and e f for f

    On the CPU rows that share a prefix keep their S x S mask, one for all layers of a stage. The
    last stage adds 3h of the final norm, and bytes that do not depend on the vocabulary: the loss
    head computes its logits again in the backward pass. With full recomputation a layer keeps its
    input of h, and one layer at a time the rest. Stage i of P keeps min(P - i, micro-batches)
    micro-batches at once (1F1B).
    """
    p = config.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    h, q, k = shape.hidden_size, shape.query_size, shape.key_value_size
    f = shape.ffn_hidden_size * shape.experts_per_token
    of_experts = shape.experts_per_token * h + f / tp if shape.num_experts > 1 else 0.0
    if config.platform.kind == "cpu":
        heads = shape.num_attention_heads
        element, layer = FP32, 6 * h + 4 * q / heads + (4 * q + heads + 5 * f) / tp
    else:
        whole = 4 * h / (tp if p.sequence_parallel else 1)
        element, layer = 2, whole + (3 * q + 3 * k + 3 * f) / tp
    layer += of_experts
    tokens = workload.rows_per_micro_batch * workload.row_length
    layers = shape.num_layers / pp
    if config.model.recompute_granularity == "full":
        a_batch = tokens * element * (h * layers + layer)
    else:
        a_batch = tokens * element * layer * layers
    if config.platform.kind == "cpu" and config.objective.row_layout == "shared_prefix":
        a_batch += tokens * workload.row_length * element
    if stage == pp - 1:
        a_batch += tokens * (3 * h * element + HEAD_BYTES)
    return round(a_batch * min(pp - stage, workload.micro_batches))


def exchange_bytes(config: Config, shape: Shape) -> int:
    """Peak of a weight exchange on rank 0.

    shared_memory: two buckets of at most `rollout.bucket_mib` (or one larger tensor), files in
    memory. nccl: two packed buffers and one in the making, each with its largest tensor.
    """
    if config.rollout is None:
        return 0
    size = weight_bytes(config.platform.kind)
    largest = size * max(shape.head, shape.hidden_size * shape.ffn_hidden_size)
    limit = config.rollout.bucket_mib * 2**20
    if config.rollout.weight_transfer == "nccl":
        return (NCCL_BUFFERS + 1) * (limit + largest)
    return 2 * min(max(limit, largest), shape.parameters * size)
