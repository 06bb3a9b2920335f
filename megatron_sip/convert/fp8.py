"""A Hugging Face folder quantised to FP8 by nvidia-modelopt, and how much that changes the model.

Weights and inputs of all linear layers but the head become e4m3 with one scale each (modelopt's
FP8_DEFAULT_CFG). The scales of inputs come from a pass over token ids of the run's own data; the
error is measured on others of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from megatron_sip import checkpoint_files
from megatron_sip.config import Config
from megatron_sip.convert.checkpoints import Progress, megatron_to_huggingface, new_folder
from megatron_sip.convert.hf_folder import carry_tokenizer
from megatron_sip.data.blended_corpus import open_corpus
from megatron_sip.data.sampler import PrefixSuffixSampler
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.recipe import load_config

REPORT = "fp8_report.json"


@dataclass(frozen=True)
class Fp8Report:
    """What was quantised and what that did; nats are means a token of the held-out samples."""

    quantised: tuple[str, ...]
    """Layers whose weights and inputs are FP8."""
    kept: tuple[str, ...]
    """Linear layers and embeddings that are as they were."""
    calibration_tokens: int
    measured_tokens: int
    nll: float
    """Of the data under the model before."""
    nll_fp8: float
    logprob_error: float
    """|log-prob before - after| of the data's tokens."""
    kl: float
    """KL(before || after) of the distributions."""
    same_top_token: float
    """Share of positions whose likeliest token stays."""


def quantise(
    source: Path, target: Path, *, calibration: Sequence[np.ndarray], held_out: Sequence[np.ndarray]
) -> Fp8Report:
    """Write `target`, an existing folder, without tokenizer; needs the whole model in memory.

    Args:   source: folder in a wider dtype.
            calibration, held_out: token ids of samples, each int[T] with T of 2 or more.
    Raises: ValueError if there are no samples, or nothing was quantised.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    if not calibration or not held_out:
        raise ValueError("--fp8 needs samples to calibrate with and others to measure the error on")
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", use_safetensors=True, trust_remote_code=False
    ).eval()
    before = [_logprobs(model, ids) for ids in held_out]

    def calibrate(module: torch.nn.Module) -> None:
        for ids in calibration:
            _logprobs(module, ids)

    model = mtq.quantize(model, mtq.FP8_DEFAULT_CFG, calibrate)
    after = [_logprobs(model, ids) for ids in held_out]
    export_hf_checkpoint(model, export_dir=target)
    quantised, kept = _layers(target)
    if not quantised:
        raise ValueError(f"{source}: nvidia-modelopt quantised no layer of it")
    report = Fp8Report(
        quantised, kept, sum(map(len, calibration)), sum(len(i) - 1 for i in held_out),
        **differences(before, after, held_out),
    )  # fmt: skip
    (target / REPORT).write_text(json.dumps(asdict(report), indent=1))
    return report


def _logprobs(model: Callable[..., object], ids: np.ndarray) -> torch.Tensor:
    """float32[T - 1, V] of what follows each token, nats."""
    tokens = torch.from_numpy(np.asarray(ids, np.int64))[None]
    with torch.no_grad():
        out = model(tokens)
    return out.logits[0, :-1].float().log_softmax(-1)  # type: ignore[attr-defined]


def _layers(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of layers with weights of two dimensions: those that are FP8 in the folder, others."""
    quantised, kept = [], []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                if name.endswith(".weight") and len(part.get_shape()) == 2:
                    of = quantised if part.get_dtype() == "F8_E4M3" else kept
                    of.append(name.removesuffix(".weight"))
    return tuple(sorted(quantised)), tuple(sorted(kept))


def differences(
    before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], ids: Sequence[np.ndarray]
) -> dict[str, float]:
    """The measured fields of a report.

    Args: before, after: float[T - 1, V] log-probs for each sample of `ids`, int[T].
    """
    labels = torch.cat([torch.from_numpy(np.asarray(i[1:], np.int64)) for i in ids])[:, None]
    p, q = torch.cat([*before]).double(), torch.cat([*after]).double()
    old, new = p.gather(1, labels), q.gather(1, labels)
    return {
        "nll": -old.mean().item(),
        "nll_fp8": -new.mean().item(),
        "logprob_error": (old - new).abs().mean().item(),
        "kl": (p.exp() * (p - q)).sum(1).mean().item(),
        "same_top_token": (p.argmax(1) == q.argmax(1)).double().mean().item(),
    }


def megatron_to_fp8(
    megatron: Path, hf: Path, *, dtype: str | None, tokenizer: Path | None, progress: Progress
) -> int:
    """Write the folder `hf` in FP8, whole or not at all, with fp8_report.json in it.

    Args:    as `megatron_to_huggingface`; dtype: of what is not quantised.
    Returns: number of parameters.
    Raises:  ValueError if `megatron` is not of a run, whose data the scales come from; and as
             `megatron_to_huggingface`.
    """
    recipe = checkpoint_files.find(megatron, key="--megatron").parent.parent / "config.toml"
    if not recipe.is_file():
        raise ValueError(
            f"--fp8 takes its scales from a run's own data, and {recipe} is not there; name a run "
            "directory, or a checkpoint inside one"
        )
    config = load_config(recipe)
    calibration, held_out = (
        samples(config, split, number) for split, number in (("train", 64), ("validation", 32))
    )
    with tempfile.TemporaryDirectory(dir=hf.parent, prefix=f".{hf.name}.") as name:
        wide = Path(name) / "wide"
        count = megatron_to_huggingface(
            megatron, wide, dtype=dtype, tokenizer=tokenizer, progress=progress
        )
        progress(f"calibrating on {len(calibration)} samples of data.train")
        with new_folder(hf) as folder:
            report = quantise(wide, folder, calibration=calibration, held_out=held_out)
            carry_tokenizer(wide, folder)
    progress(
        f"{len(report.quantised)} layers are FP8, {', '.join(report.kept)} are not; on "
        f"{report.measured_tokens} tokens of data.validation NLL {report.nll:.4f} -> "
        f"{report.nll_fp8:.4f} nats, KL {report.kl:.2g} nats, mean |log-prob error| "
        f"{report.logprob_error:.2g} nats, likeliest token the same at {report.same_top_token:.1%}"
    )
    return count


def samples(config: Config, split: str, number: int) -> list[np.ndarray]:
    """Token ids of the first samples of one of a run's splits: prefix and suffix, int[P + N]."""
    tokenizer = Tokenizer.load(config.data.tokenizer)
    corpus = open_corpus(
        getattr(config.data, split),
        min_tokens=config.data.min_prefix_tokens + config.data.suffix_tokens,
        cache_dir=config.data.cache_dir,
    )
    corpus.check_tokenizer(tokenizer.digest, path=config.data.tokenizer)
    sampler = PrefixSuffixSampler(
        corpus,
        prefix_tokens=config.data.prefix_tokens,
        min_prefix_tokens=config.data.min_prefix_tokens,
        suffix_tokens=config.data.suffix_tokens,
        seed=config.run.seed,
        word_starts=tokenizer.word_starts,
        eod=tokenizer.eod,
    )
    cut = [sampler[i] for i in range(number)]
    return [np.concatenate([sample.prefix_ids, sample.suffix_ids]) for sample in cut]
