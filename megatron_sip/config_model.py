"""The recipe's section [model]: sizes, the family they belong to, and the first weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_sip.config_base import Positive, PositiveInt, Section

EXPERT_FAMILIES = ("mixtral", "qwen3_moe")


class RandomInit(Section):
    kind: Literal["random"]


class MegatronInit(Section):
    kind: Literal["megatron"]
    path: Path
    """A checkpoint folder of ours (`.../step_00000100`) or a run directory (its latest)."""


class HuggingFaceInit(Section):
    kind: Literal["huggingface"]
    path: Path
    """A folder with config.json, tokenizer and safetensors; its sizes and tokenizer must be those
    of this recipe."""


class RopeScaling(Section):
    """Llama 3.1's rotary embedding: long waves are slowed down, short ones kept."""

    factor: Positive
    """How much the long waves are slowed down."""
    low_freq_factor: Positive = 1.0
    """Waves longer than original_max_position_embeddings / this are slowed down wholly."""
    high_freq_factor: Positive = 4.0
    """Waves shorter than original_max_position_embeddings / this are kept."""
    original_max_position_embeddings: PositiveInt = 8192
    """Context length before the scaling."""


class Experts(Section):
    """Experts instead of the MLP of each layer."""

    num_experts: PositiveInt
    experts_per_token: PositiveInt
    normalize: bool = True
    """Weights of a token's experts sum to one; if not, they are the softmax over all experts."""


class Model(Section):
    family: Literal["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"] = "llama"
    """What the model is to Hugging Face and vLLM. qwen2 has biases on queries, keys and values,
    qwen3 and qwen3_moe norms on queries and keys; mixtral and qwen3_moe have experts."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    """Width of the MLP, or of one expert."""
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    """KV heads (grouped-query attention)."""
    kv_channels: PositiveInt | None = None
    """Size of a head; left out: hidden_size / num_attention_heads."""
    max_sequence_length: PositiveInt
    vocab_size: PositiveInt | None = None
    """Rows of the embedding, where they are more than the tokenizer has pieces, as in folders of
    Hugging Face; left out: the tokenizer's. The model can choose them, so they are no padding."""
    make_vocab_size_divisible_by: PositiveInt = 1
    """The vocabulary is padded to a multiple of this x TP; nothing ever sees the padding."""
    rotary_base: PositiveInt = 10000
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's scaling of the rotary embedding; left out: none."""
    norm_epsilon: Positive = 1e-5
    init_std: Positive = 0.02
    share_embeddings_and_output_weights: bool = False
    """Tied embeddings."""
    experts: Experts | None = None
    """mixtral and qwen3_moe only, which need it."""
    recompute_granularity: Literal["full"] | None = None
    """full: keep each layer's input and compute the rest again in the backward pass."""
    init: Annotated[RandomInit | MegatronInit | HuggingFaceInit, Field(discriminator="kind")] = (
        RandomInit(kind="random")
    )
    """Where the first weights come from."""

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def head_dim_key(self) -> str:
        """The keys that head_dim comes from, for messages."""
        return (
            "model.kv_channels"
            if self.kv_channels
            else ("model.hidden_size / model.num_attention_heads")
        )

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family in ("qwen3", "qwen3_moe")

    def vocabulary(self, tokenizer_size: int) -> int:
        """Rows of the embedding without padding, for a tokenizer of this size."""
        return self.vocab_size or tokenizer_size

    def padded_vocabulary(self, vocab_size: int, *, tensor_parallel: int) -> int:
        """Rows with padding: a multiple of make_vocab_size_divisible_by x TP."""
        multiple = self.make_vocab_size_divisible_by * tensor_parallel
        return -(-vocab_size // multiple) * multiple


def model_rules(m: Model) -> Iterator[tuple[bool, str]]:
    """(rule holds, message) for what the keys of the section say of each other."""
    yield (
        m.kv_channels is not None or m.hidden_size % m.num_attention_heads == 0,
        f"model.hidden_size {m.hidden_size} must be a multiple of model.num_attention_heads "
        f"{m.num_attention_heads}",
    )
    yield (
        m.head_dim % 2 == 0,
        f"{m.head_dim_key} = {m.head_dim}: the rotary embedding needs heads of an even size",
    )
    yield (
        m.num_attention_heads % m.num_query_groups == 0,
        f"model.num_attention_heads {m.num_attention_heads} must be a multiple of "
        f"model.num_query_groups {m.num_query_groups}",
    )
    yield (
        m.family != "qwen2" or m.head_dim * m.num_attention_heads == m.hidden_size,
        f'model.kv_channels is {m.kv_channels}, but model.family "qwen2" has heads of '
        "model.hidden_size / model.num_attention_heads, and vLLM knows no others; leave it out",
    )
    wanted = m.family in EXPERT_FAMILIES
    yield (
        wanted == (m.experts is not None),
        f'model.family "{m.family}" {"needs" if wanted else "has no"} [model.experts]; '
        f"{'give it' if wanted else 'remove it, or name one of ' + ', '.join(EXPERT_FAMILIES)}",
    )
    if m.experts is not None:
        yield (
            m.experts.experts_per_token <= m.experts.num_experts,
            f"model.experts.experts_per_token {m.experts.experts_per_token} must not exceed "
            f"model.experts.num_experts {m.experts.num_experts}",
        )
        yield (
            m.experts.normalize or m.family != "mixtral",
            'model.experts.normalize is false, but model.family "mixtral" always normalises; '
            "remove it",
        )
    if m.rope_scaling is not None:
        low, high = m.rope_scaling.low_freq_factor, m.rope_scaling.high_freq_factor
        yield (
            low < high,
            f"model.rope_scaling.low_freq_factor {low:g} must be below high_freq_factor {high:g}",
        )
