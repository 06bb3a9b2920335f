"""An explanation as text for people (rich) and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TextIO

from rich.console import Console

from megatron_sip import preflight
from megatron_sip.config import Config
from megatron_sip.explain.numbers import bytes_text
from megatron_sip.explain.plan import Explanation, explain
from megatron_sip.explain.tables import head, table
from megatron_sip.explain.text_work import (
    print_bottleneck,
    print_files,
    print_servers,
    print_step,
)

MAX_RANKS = 8  # more are condensed
MIN_WIDTH = 100


def print_explanation(config: Config, *, as_json: bool) -> None:
    """Explain a recipe on standard output.

    Raises: ValueError if the recipe cannot run anywhere, see `plan.explain`.
    """
    found = explain(config, missing=preflight.problems(config))
    (print_json if as_json else print_text)(found)


def print_json(found: Explanation, file: TextIO | None = None) -> None:
    """One JSON object: the resolved recipe as "config", and all fields of the explanation."""
    parts = _plain(found)
    config = found.config.model_dump(mode="json", exclude_none=True)
    print(
        json.dumps(parts | {"config": config}, default=_plain, indent=1, allow_nan=False), file=file
    )


def _plain(value: object) -> dict[str, object]:
    """A dataclass as a dict, its properties (sums) included."""
    names = [f.name for f in dataclasses.fields(value)]  # type: ignore[arg-type]
    names += [n for n, v in vars(type(value)).items() if isinstance(v, property)]
    return {name: getattr(value, name) for name in names}


def print_text(found: Explanation, file: TextIO | None = None) -> None:
    """Sections in the order of a run: what it is, ranks, memory, step, servers, files."""
    out = Console(file=file or sys.stdout, markup=False, emoji=False, highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, MIN_WIDTH)
    run = found.config.run
    out.print(
        f"{run.task}: {run.steps:,} steps, seed {run.seed}, into {run.dir} "
        "(nothing was started or written)",
        style="bold",
    )
    for problem in found.obstacles:
        out.print(f"would stop the run: {problem}", style="red")
    for print_section in (_data, _ranks, _parameters, _memory):
        print_section(out, found)
    for step in found.steps:
        print_step(out, found, step)
        print_bottleneck(out, step)
    print_servers(out, found.servers)
    print_files(out, found)


def _data(out: Console, found: Explanation) -> None:
    head(out, "data")
    data, config = found.data, found.config.data
    assumed = " assumed (no tokenizer)" if data.vocab_size_assumed else ""
    out.print(f"vocabulary {data.vocab_size:,}{assumed}")
    if data.passes is None:
        out.print("size of the data and passes over it: not known, the data is not there")
    else:
        out.print(
            f"{config.train}: {data.train_tokens:,} tokens, {data.eligible_documents:,} of "
            f"{data.train_documents:,} documents long enough; the run makes {data.passes:.2f} "
            "passes over them"
        )
    kind = "mean of samples" if found.lengths.measured["prefix"] else "at the most"
    out.print(
        f"prefix {found.lengths.prefix:,.0f} tokens ({kind}), suffix {config.suffix_tokens}, "
        f"row {found.steps[0].work.row_length:,} positions "
        f"(a multiple of {found.steps[0].work.row_multiple})"
    )


def _ranks(out: Console, found: Explanation) -> None:
    p, ranks = found.config.parallel, found.ranks
    head(out, f"ranks: {p.world_size} on {found.config.platform.kind}")
    out.print(
        f"tensor parallel {p.tensor_model_parallel_size}, pipeline parallel "
        f"{p.pipeline_model_parallel_size}, data parallel {p.data_parallel_size}"
        + (
            f", expert parallel {p.expert_model_parallel_size}"
            if found.config.model.experts
            else ""
        )
        + (", sequence parallel" if p.sequence_parallel else "")
    )
    shown = ranks if len(ranks) <= MAX_RANKS else (*ranks[: MAX_RANKS - 2], ranks[-1])
    rows = [
        (str(r.rank), str(r.tp_rank), str(r.pp_rank), str(r.dp_rank), "; ".join(r.duties) or "-")
        for r in shown
    ]
    if len(ranks) > MAX_RANKS:
        rows.insert(MAX_RANKS - 2, ("...", "", "", "", f"{len(ranks) - MAX_RANKS + 1} more ranks"))
    out.print(table((">rank", ">tp", ">pp", ">dp", "beside training its part"), rows))
    for name, duty in (("I/O ranks", "I/O"), ("ranks that report the loss", "reports")):
        found_ranks = [r.rank for r in ranks if any(d.startswith(duty) for d in r.duties)]
        names = ", ".join(map(str, found_ranks[:MAX_RANKS]))
        more = ", ..." if len(found_ranks) > MAX_RANKS else ""
        out.print(f"{name}: {len(found_ranks)} ({names}{more})")


def _parameters(out: Console, found: Explanation) -> None:
    total, stages = found.parameters.total, found.parameters.per_rank
    head(out, f"parameters: {sum(total.values()):,}")
    names = [f">rank of stage {i}" if len(stages) > 1 else ">each rank" for i in range(len(stages))]
    rows = [
        [part, f"{n:,}", *(f"{s[part]:,}" for s in stages)]
        for part, n in total.items()
        if part != "experts" or n
    ]
    rows.append(["all", *(f"{sum(x.values()):,}" for x in (total, *stages))])
    out.print(table(("part", ">model", *names), rows))


def _memory(out: Console, found: Explanation) -> None:
    head(out, "memory of a rank")
    stages = found.memory
    names = [f">stage {m.stage}" for m in stages] if len(stages) > 1 else [">each rank"]
    lines = [
        ("weights", "weights"), ("gradients (fp32)", "gradients"),
        ("optimizer state, sharded", "optimizer"), ("frozen start policy", "start_policy"),
        ("frozen reference of its own", "reference"), ("all the time", "steady"),
        ("activations, at the most", "activations"), ("weight exchange, rank 0", "exchange"),
        ("together", "total"),
    ]  # fmt: skip
    rows = [[text, *(bytes_text(getattr(m, name)) for m in stages)] for text, name in lines]
    out.print(table(("tensors", *names), rows))
    out.print("not counted: the process itself, temporary tensors inside an operation", style="dim")
    if found.host.slots:
        out.print(
            f"shared memory on rank 0's host, part of the weight exchange: "
            f"{bytes_text(found.host.slots)}"
        )
    if found.host.checkpoint_copy:
        out.print(
            "host memory beside it while a checkpoint is written, all ranks together: "
            f"{bytes_text(found.host.checkpoint_copy)}"
        )
    hardware = found.steps[0].bottleneck.hardware
    if hardware is not None:
        largest = max(m.total for m in stages)
        verdict = "fits" if largest < hardware.memory_bytes else "DOES NOT FIT"
        size = bytes_text(int(hardware.memory_bytes))
        out.print(f"{verdict} a GPU of {size} (assumed: {hardware.name})")
