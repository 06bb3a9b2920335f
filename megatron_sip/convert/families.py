"""What a recipe's [model] is in the config.json of a Hugging Face folder, and back. Pure.

One description a family. What is not described cannot be trained as it is meant, so every key that
changes the model and has another value than the one known here is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megatron_sip.config_model import Experts, Model, RopeScaling, model_rules


@dataclass(frozen=True)
class Family:
    """How one family writes its config.json."""

    architecture: str
    fixed: Mapping[str, Any]
    """Keys that must have this value, or be absent where it is the default; written as they are."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Meaning of absent keys, where leaving them out is usual."""
    width: str = "intermediate_size"
    """Key of the MLP's width, or of one expert's."""
    num_experts: tuple[str, ...] = ()
    """Keys of the number of experts; the first is written."""
    windows: bool = False
    """sliding_window limits attention."""


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        {"rope_theta": 10000.0},
    ),
    "mistral": Family(
        "MistralForCausalLM", {"hidden_act": "silu"}, {"sliding_window": 4096}, windows=True
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        {"head_dim": 128},
    ),
    "mixtral": Family(
        "MixtralForCausalLM", {"hidden_act": "silu"}, num_experts=("num_local_experts",),
        windows=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False,
         "decoder_sparse_step": 1, "mlp_only_layers": []},
        width="moe_intermediate_size", num_experts=("num_experts", "num_local_experts"),
    ),
}  # fmt: skip

UNKNOWN = {
    "quantization_config": "quantised weights are not read",
    "auto_map": "the folder wants to run code of its own, which is never done",
}


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that config.json names; None where it names none."""

    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None


def describe(model: Model, *, vocab_size: int, special: SpecialIds, dtype: str) -> dict[str, Any]:
    """config.json of the folder. Args: vocab_size: rows without padding. dtype: as "float32"."""
    family = FAMILIES[model.family]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.rope_scaling is not None:
        rope |= {"rope_type": "llama3"} | model.rope_scaling.model_dump()
    found: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model.family,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope,
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
        "dtype": dtype,
        "torch_dtype": dtype,
    }  # fmt: skip
    if model.rope_scaling is not None:
        found["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if family.windows:
        found["sliding_window"] = None
    if model.experts is not None:
        found[family.width] = model.ffn_hidden_size
        found[family.num_experts[0]] = model.experts.num_experts
        found["num_experts_per_tok"] = model.experts.experts_per_token
        if model.family != "mixtral":
            found["norm_topk_prob"] = model.experts.normalize
    return found | dict(family.fixed)


def model_of(description: Mapping[str, Any], *, source: str) -> Model:
    """The [model] of a config.json, with its longest sequence; first weights are left random.

    Args:   source: names the file in messages.
    Raises: ValueError naming the first key that is absent, or whose value is not known here.
    """
    kind = description.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{source}: model_type is {kind!r}, which is none of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[str(kind)]
    for key, value, rule in _contradictions(description, family):
        raise ValueError(f"{source}: {key} is {value!r}, but {rule}")
    known = dict(family.defaults) | {k: v for k, v in description.items() if v is not None}

    def get(key: str) -> Any:
        if key not in known:
            raise ValueError(f"{source} has no {key}; copy the file anew")
        return known[key]

    base, scaling = _rope(description, known, source)
    heads, experts = get("num_attention_heads"), None
    if family.num_experts:
        named = [known[key] for key in family.num_experts if key in known]
        experts = {
            "num_experts": named[0] if named else get(family.num_experts[0]),
            "experts_per_token": get("num_experts_per_tok"),
            "normalize": kind == "mixtral" or get("norm_topk_prob"),
        }
    fields = {
        "family": kind,
        "num_layers": get("num_hidden_layers"),
        "hidden_size": get("hidden_size"),
        "ffn_hidden_size": get(family.width),
        "num_attention_heads": heads,
        "num_query_groups": known.get("num_key_value_heads", heads),
        "kv_channels": known.get("head_dim"),
        "max_sequence_length": get("max_position_embeddings"),
        "vocab_size": get("vocab_size"),
        "rotary_base": base,
        "rope_scaling": scaling,
        "norm_epsilon": get("rms_norm_eps"),
        "share_embeddings_and_output_weights": known.get("tie_word_embeddings", False),
        "experts": experts,
    }
    try:
        model = Model(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{source}: {'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}"
        ) from None
    for holds, message in model_rules(model):
        if not holds:
            raise ValueError(f"{source}: {message}")
    changed: dict[str, Any] = {}
    if model.head_dim * model.num_attention_heads == model.hidden_size:
        changed["kv_channels"] = None
    window = description.get("sliding_window", family.defaults.get("sliding_window"))
    if family.windows and window is not None:
        changed["max_sequence_length"] = min(model.max_sequence_length, int(window))
    return model.model_copy(update=changed)


def _contradictions(
    description: Mapping[str, Any], family: Family
) -> Iterator[tuple[str, Any, str]]:
    """(key, its value, what is known here) for keys that name another model than is built."""
    named = description.get("architectures") or [family.architecture]
    if named != [family.architecture]:
        yield "architectures", named, f"this model_type is {family.architecture} here"
    for key, reason in UNKNOWN.items():
        if description.get(key) is not None:
            yield key, description[key], reason
    for key, value in family.fixed.items():
        if description.get(key, value) != value:
            yield key, description[key], f"only {value!r} is known here"
    if description.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor", description["partial_rotary_factor"], "only 1 is known here"


def _rope(
    description: Mapping[str, Any], known: Mapping[str, Any], source: str
) -> tuple[int, dict[str, Any] | None]:
    """Base and scaling of the rotary embedding, from the older keys or the newer one."""
    rope = description.get("rope_parameters") or description.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{source}: the scaling of rope is {rope!r}, but must be an object")
    base = rope.get("rope_theta", known.get("rope_theta"))
    if base is None:
        raise ValueError(f"{source} has no rope_theta; copy the file anew")
    if not isinstance(base, int | float) or base != int(base):
        raise ValueError(f"{source}: rope_theta is {base!r}, but only whole numbers are known here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return int(base), None
    if kind != "llama3":
        raise ValueError(
            f'{source}: rope_type is "{kind}", but only "default" and "llama3" are known here'
        )
    missing = [key for key in RopeScaling.model_fields if key not in rope]
    if missing:
        raise ValueError(f"{source}: the scaling of rope has no {', '.join(missing)}")
    return int(base), {k: rope[k] for k in RopeScaling.model_fields}


# keys of [model] that do not change what weights mean: a recipe chooses them
FREE = frozenset({"init", "init_std", "make_vocab_size_divisible_by", "recompute_granularity"})


def disagreements(model: Model, folder: Model, *, tokenizer_size: int) -> Iterator[str]:
    """One message for each key of a recipe's [model] that its folder contradicts.

    Args: tokenizer_size: pieces of the recipe's tokenizer.
    """
    for key in Model.model_fields:
        mine, theirs = getattr(model, key), getattr(folder, key)
        rule, name = "must be", f"model.{key}"
        if key in FREE:
            continue
        if key == "vocab_size":
            mine = model.vocabulary(tokenizer_size)
            if mine != theirs and model.vocab_size is None:
                name = f"model.vocab_size is left out and the tokenizer's {tokenizer_size}"
        if key == "kv_channels":
            mine, theirs = model.head_dim, folder.head_dim
        if key == "max_sequence_length":
            rule, same = "must not exceed", mine <= theirs
        elif isinstance(mine, float) and isinstance(theirs, float):
            same = math.isclose(mine, theirs, rel_tol=1e-6)  # files hold rounded float32
        else:
            same = mine == theirs
        if not same:
            yield f"{name} is {_shown(mine)}, but {rule} {_shown(theirs)}"


def _shown(value: Any) -> str:
    if isinstance(value, RopeScaling | Experts):
        return f"{{{', '.join(f'{k} = {v}' for k, v in value.model_dump().items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    return "left out" if value is None else str(value)
