"""The recipe's keys as frozen models. Every default lives here; no torch is imported.

Unknown keys and wrong types are errors; rules that span sections stand in `config_rules*.py`, the
sections [judge], [rewriter], [objective], [reference] and [metrics] in files of their own, and
`recipe.py` reads files. Validation never assigns.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_sip.config_base import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
)
from megatron_sip.config_judge import Judge, Rewriter
from megatron_sip.config_metrics import Metrics
from megatron_sip.config_model import Model
from megatron_sip.config_objective import Objective, Reference
from megatron_sip.config_rules import broken_rules
from megatron_sip.types import Source


class Run(Section):
    task: Literal["ntp", "sip"]
    """ntp: next-token prediction only, no servers. sip: rollouts, judges, objectives."""
    dir: Path
    """Run directory; must be absent or empty."""
    steps: PositiveInt
    """Optimizer steps of the whole run."""
    seed: NonNegativeInt = 1
    """Root of all randomness: (seed, step, sample, candidate)."""
    hang_timeout_s: Positive = 120.0
    """Longest wait without any progress of a rank before it reports where it is, with stacks."""
    max_gib: Positive | None = None
    """Most that the run directory may take, GiB; None: what the disk has. Before it would be more,
    the run saves a checkpoint and ends."""
    keep_pools: PositiveInt | None = None
    """Newest steps whose pools are kept; None: all. Pools of the steps after the oldest checkpoint
    always stay; a run whose first pools are gone cannot be replayed with --pools."""
    max_log_mib: PositiveInt = 256
    """Longest log; what it holds then moves to NAME.1, in place of what was there."""


class Fp8(Section):
    format: Literal["e4m3", "hybrid"] = "hybrid"
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "blockwise"
    """mxfp8 needs Blackwell; delayed keeps an amax history."""
    param: bool = False
    """Keep weights themselves in FP8 (gathered in FP8 over data parallel)."""
    amax_history_len: PositiveInt = 1
    """Steps of amax history; only the delayed recipe uses it."""


class PlatformConfig(Section):
    kind: Literal["cpu", "cuda"]
    """cpu: gloo, fp32, local layer spec. cuda: NCCL, bf16, Transformer Engine."""
    num_threads: PositiveInt = 1
    """CPU threads of one trainer rank."""
    fp8: Fp8 | None = None
    """FP8 layers; cuda only."""
    deterministic: bool = False
    """Only kernels that give the same bits each time; the run's first update is computed twice, and
    the run stops if they differ."""


class Parallel(Section):
    world_size: PositiveInt
    """Ranks that torchrun must start; data parallel is world_size / (TP x PP)."""
    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    expert_model_parallel_size: PositiveInt = 1
    """Data-parallel ranks over which a layer's experts are spread; the rest of the layer is whole
    on each of them."""
    sequence_parallel: bool = False
    """Split norms over TP ranks; cuda only (the CPU layer spec refuses it)."""

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        )


class Optimizer(Section):
    lr: Positive
    min_lr: NonNegative = 0.0
    decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegative = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: Positive = 1e-8
    clip_grad: Positive = 1.0
    """Global gradient-norm limit."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    nonfinite: Literal["stop", "skip"] = "stop"
    """stop: a loss or gradient that is NaN or infinite ends the run. skip: that step leaves weights
    and optimizer state as they are, and the run goes on with the next prompts."""
    max_skipped_steps: PositiveInt = 3
    """Steps in a row that may be skipped; one more stops the run."""


class BlendPart(Section):
    """One part of a blend; all parts of it give the same one of weight, epochs and tokens."""

    prefix: str
    """Prefix, pattern of prefixes (data/shards/*) or fsspec URL of indexed datasets."""
    mask: str = ""
    """Take only documents of the mask PREFIX.NAME of each dataset; empty: all long enough ones."""
    weight: Positive | None = None
    """Share of the samples, relative to the other parts' weights."""
    epochs: Positive | None = None
    """Passes over the part's eligible documents."""
    tokens: Positive | None = None
    """Passes such that so many tokens of eligible documents are passed."""


class Data(Section):
    tokenizer: Path
    """sentencepiece .model or tokenizer.json; its digest must equal that in the data's manifest."""
    train: str | tuple[BlendPart, ...]
    """What samples are drawn from: prefix of .bin/.idx/.manifest.json, a pattern of prefixes, an
    fsspec URL, or the parts of a blend ([[data.train]])."""
    validation: str | tuple[BlendPart, ...]
    """The validation set, in the same ways."""
    test: str | tuple[BlendPart, ...]
    """The test set; read by the final evaluation only."""
    cache_dir: Path | None = None
    """Folder on a local disk for the index files of datasets in object stores (s3://, gs://)."""
    prefetch_steps: NonNegativeInt = 1
    """Steps whose samples are read ahead of their turn."""
    prefix_tokens: PositiveInt
    """P, the longest prefix."""
    min_prefix_tokens: PositiveInt
    """The shortest prefix; documents shorter than this plus N are not eligible."""
    suffix_tokens: PositiveInt
    """N, tokens to predict and the limit of every candidate."""
    global_batch_size: PositiveInt
    """Prompts a step over all ranks."""
    micro_batch_size: PositiveInt
    """Prompts a micro-batch on one data-parallel rank; a pool's rows are never parted."""


class StartServer(Section):
    """A vLLM server that rank 0 starts, watches and ends."""

    kind: Literal["start"]
    model: Path | Literal["policy"]
    """Hugging Face folder, or "policy": the run's own model, exported at the start."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: PositiveInt
    max_num_seqs: PositiveInt = 64
    kv_cache_gib: PositiveInt = 1
    """CPU only: KV cache size."""
    num_threads: PositiveInt = 2
    """CPU only: OpenMP threads of the engine."""
    gpus: tuple[NonNegativeInt, ...] = ()
    """CUDA devices of this server; tensor parallel size is their number."""
    startup_timeout_s: Positive = 300.0
    max_restarts: NonNegativeInt = 3
    """How often it is started anew within restart_window_s before the run stops."""
    restart_window_s: Positive = 3600.0


class ConnectServer(Section):
    """A vLLM server that others run."""

    kind: Literal["connect"]
    url: str
    """http://host:port without a path."""
    model: str
    """Model name that the server must report."""
    tokenizer: Path | None = None
    """Folder with the server model's tokenizer.json and chat template. Only a server that is asked
    for reasoned answers and nothing else can do without."""
    api_key_env: str = ""
    """Environment variable that holds the bearer token; empty: none (loopback only)."""
    prompt_price: NonNegative = 0.0
    """Money for 10^6 prompt tokens, in any currency."""
    completion_price: NonNegative = 0.0
    """Money for 10^6 tokens that it writes."""


Server = Annotated[StartServer | ConnectServer, Field(discriminator="kind")]


class Rollout(Section):
    server: str | tuple[str, ...]
    """Who generates. Several share the prompts: a prefix always meets the same one."""
    num_rollouts: PositiveInt
    """K, rollouts of the current policy for one prefix."""
    temperature: Positive = 1.0
    top_p: Fraction = 1.0
    sync_interval: PositiveInt = 1
    """Optimizer steps between weight exchanges."""
    weight_transfer: Literal["shared_memory", "nccl"]
    """shared_memory: one CPU host. nccl: GPUs, vLLM's native trainer engine."""
    bucket_mib: PositiveInt = 256
    """Largest piece of weights in flight."""
    sync_timeout_s: Positive = 300.0
    """Deadline of one weight exchange over all servers; who is late is named."""
    max_logprob_mismatch: Positive
    """Largest mean |trainer - engine| log-prob a step may show, nats."""
    max_logprob_mismatch_p99: Positive | None = None
    """... its 99th percentile over all ranks' tokens, nats; left out: not limited."""
    max_logprob_mismatch_max: Positive | None = None
    """... its largest value, nats; left out: not limited."""
    max_kl: Positive | None = None
    """Largest KL(engine || trainer) estimated on the rollouts, nats a token; left out: not
    limited."""
    concurrency: PositiveInt = 64
    """Prompts in flight, for each server and each data-parallel rank."""
    timeout_s: Positive = 300.0

    @property
    def servers(self) -> tuple[str, ...]:
        return (self.server,) if isinstance(self.server, str) else self.server


class EmergentCurriculum(Section):
    """All sources from the first step; the judge's choice does the mixing (the paper)."""

    kind: Literal["emergent"]
    sources: tuple[Source, ...] = Field(min_length=1)


class StagedCurriculum(Section):
    """nll, then rf_nll on suffix, rewrite and few rollouts, then the final objective."""

    kind: Literal["staged"]
    sources: tuple[Source, ...] = Field(min_length=1)
    """Pool of the final stage."""
    nll_tokens: NonNegativeInt
    """Suffix tokens spent on nll before rf_nll begins."""
    rf_nll_rollouts: PositiveInt = 1
    promote_win_rate: Fraction = 0.3
    """Smoothed rollout win rate over the suffix at which the final stage begins."""
    demote_win_rate: NonNegative = 0.2
    """... and below which it falls back to rf_nll (hysteresis)."""
    smoothing: Fraction = 0.1
    """Weight of the newest step in the moving average."""
    min_stage_steps: PositiveInt = 10


Curriculum = Annotated[EmergentCurriculum | StagedCurriculum, Field(discriminator="kind")]


class Checkpoint(Section):
    interval: PositiveInt
    """Steps between checkpoints; one is always written at the end."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are a multiple of this are kept for good."""
    asynchronous: bool = False
    """Write while training goes on, from a copy in host memory; a step waits for the copy alone."""


class Evaluation(Section):
    num_prefixes: PositiveInt
    """Test prefixes, sampled once from data.test."""
    server: str = ""
    """sip only: judge server whose likelihood decides a win."""
    prefix_tokens: PositiveInt = 2048
    """That judge sees at most this many of the prefix's last policy tokens."""
    bootstrap: PositiveInt = 2000
    """Resamples for the 95 % interval."""
    seed: NonNegativeInt = 20_000
    """Root of the test prefixes and of both policies' samples; no other seed moves them."""
    interval: PositiveInt | None = None
    """Steps between evaluations on data.validation while the run goes on; None: no such."""
    interval_prefixes: PositiveInt = 64
    """Validation prefixes of each of them, always the same."""


class Config(Section):
    run: Run
    platform: PlatformConfig
    model: Model
    parallel: Parallel
    optimizer: Optimizer
    data: Data
    objective: Objective
    reference: Reference | None = None
    """What the policy is compared with; left out: frozen where the objective needs a reference."""
    checkpoint: Checkpoint
    evaluation: Evaluation
    servers: dict[str, Server] = Field(default_factory=dict)
    rollout: Rollout | None = None
    judge: Judge | None = None
    rewriter: Rewriter | None = None
    curriculum: Curriculum | None = None
    metrics: Metrics = Metrics()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        problems = broken_rules(self)
        if problems:
            raise ValueError("\n  ".join(problems))
        return self


def api_key(server: ConnectServer) -> str:
    """Bearer token of a connected server from the environment; "" when it needs none."""
    if not server.api_key_env:
        return ""
    key = os.environ.get(server.api_key_env, "")
    if not key:
        raise ValueError(f"environment variable {server.api_key_env} is empty; set it")
    return key
