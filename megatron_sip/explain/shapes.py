"""Shape of a decoder-only transformer, ours or a judge's, and its size from that shape. Pure.

Layers have grouped-query attention and a gated MLP, dense or of experts; biases, norms of heads
and attention windows are not counted (under 1 % of the models known here).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.config import Model

# model_type -> key of the MLP width of one expert; the layers of these look as counted below
KNOWN_TYPES = {
    "llama": "intermediate_size",
    "mistral": "intermediate_size",
    "qwen2": "intermediate_size",
    "qwen3": "intermediate_size",
    "mixtral": "intermediate_size",
    "gpt_oss": "intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
}


@dataclass(frozen=True)
class Shape:
    """Sizes that parameters and FLOPs follow from; all counts of elements."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied: bool
    num_experts: int = 1
    experts_per_token: int = 1

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of the keys; the values have the same."""
        return self.num_query_groups * self.head_dim

    @property
    def head(self) -> int:
        """Parameters of the output matrix, which every scored token is multiplied with."""
        return self.vocab_size * self.hidden_size

    def layer_matrices(self, experts: int) -> int:
        """Parameters of one layer's matrices with this many experts (and their router)."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.key_value_size)
        router = self.hidden_size * self.num_experts if self.num_experts > 1 else 0
        return attention + router + 3 * self.hidden_size * self.ffn_hidden_size * experts

    @property
    def matrices_per_token(self) -> int:
        """Parameters of all layers that one token is multiplied with; no embedding, no head."""
        return self.num_layers * self.layer_matrices(self.experts_per_token)

    @property
    def active_parameters(self) -> int:
        """Parameters that one generated token is multiplied with."""
        return self.matrices_per_token + self.head

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        vocabulary = self.head * (1 if self.tied else 2)
        return self.num_layers * self.layer_matrices(self.num_experts) + norms + vocabulary


def policy_shape(model: Model, *, vocab_size: int) -> Shape:
    """The model under training."""
    return Shape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        head_dim=model.head_dim,
        vocab_size=vocab_size,
        tied=model.share_embeddings_and_output_weights,
        num_experts=model.experts.num_experts if model.experts else 1,
        experts_per_token=model.experts.experts_per_token if model.experts else 1,
    )


def folder_shape(folder: Path) -> Shape:
    """Shape of a Hugging Face folder, from its config.json alone.

    Raises: ValueError saying why the size is unknown: no config.json, a key missing, or a
            model_type whose layers are not known here.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} is not there") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    kind = fields.get("model_type")
    if kind not in KNOWN_TYPES:
        raise ValueError(f"{path}: model_type {kind!r} is none of {', '.join(sorted(KNOWN_TYPES))}")
    try:
        heads = fields["num_attention_heads"]
        experts = fields.get("num_local_experts") or fields.get("num_experts") or 1
        return Shape(
            num_layers=fields["num_hidden_layers"],
            hidden_size=fields["hidden_size"],
            ffn_hidden_size=fields[KNOWN_TYPES[kind]],
            num_attention_heads=heads,
            num_query_groups=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            vocab_size=fields["vocab_size"],
            tied=fields.get("tie_word_embeddings", False),
            num_experts=experts,
            experts_per_token=fields["num_experts_per_tok"] if experts > 1 else 1,
        )
    except KeyError as error:
        raise ValueError(f"{path} has no {error}") from None
