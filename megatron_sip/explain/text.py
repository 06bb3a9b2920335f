"""An explanation as text for people (rich) and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sip.config import Config
from megatron_sip.explain.numbers import bytes_text, count_text, flops_text
from megatron_sip.explain.plan import Explanation, Step, explain
from megatron_sip.explain.servers import PORT, ServerPlan

MAX_RANKS = 8  # more are condensed
MIN_WIDTH = 100


def print_explanation(config: Config, *, as_json: bool) -> None:
    """Explain a recipe on standard output.

    Raises: ValueError if the recipe cannot run anywhere, see `plan.explain`.
    """
    (print_json if as_json else print_text)(explain(config))


def print_json(found: Explanation, file: TextIO | None = None) -> None:
    """One JSON object: the resolved recipe as "config", and all fields of the explanation."""
    parts = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    config = parts.pop("config").model_dump(mode="json", exclude_none=True)
    print(json.dumps({"config": config} | parts, default=_plain, indent=1), file=file)


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
    for problem in found.missing:
        out.print(f"would stop the run: {problem}", style="red")
    for print_section in (_data, _ranks, _parameters, _memory):
        print_section(out, found)
    for step in found.steps:
        _step(out, found, step)
        _bottleneck(out, step)
    _servers(out, found.servers)
    _files(out, found)


def _head(out: Console, title: str) -> None:
    out.print()
    out.print(title, style="bold cyan")


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """Left column of names, the others right-aligned where they hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name[0] == ">" else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _data(out: Console, found: Explanation) -> None:
    _head(out, "data")
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
    _head(out, f"ranks: {p.world_size} on {found.config.platform.kind}")
    out.print(
        f"tensor parallel {p.tensor_model_parallel_size}, pipeline parallel "
        f"{p.pipeline_model_parallel_size}, data parallel {p.data_parallel_size}"
        + (", sequence parallel" if p.sequence_parallel else "")
    )
    shown = ranks if len(ranks) <= MAX_RANKS else (*ranks[: MAX_RANKS - 2], ranks[-1])
    rows = [
        (str(r.rank), str(r.tp_rank), str(r.pp_rank), str(r.dp_rank), "; ".join(r.duties) or "-")
        for r in shown
    ]
    if len(ranks) > MAX_RANKS:
        rows.insert(MAX_RANKS - 2, ("...", "", "", "", f"{len(ranks) - MAX_RANKS + 1} more ranks"))
    out.print(_table((">rank", ">tp", ">pp", ">dp", "beside training its part"), rows))
    io = [r.rank for r in ranks if r.tp_rank == 0 and r.pp_rank == 0]
    names = ", ".join(map(str, io[:MAX_RANKS])) + (", ..." if len(io) > MAX_RANKS else "")
    out.print(f"I/O ranks: {len(io)} ({names})")


def _parameters(out: Console, found: Explanation) -> None:
    total, stages = found.parameters.total, found.parameters.per_rank
    _head(out, f"parameters: {sum(total.values()):,}")
    names = [f">rank of stage {i}" if len(stages) > 1 else ">each rank" for i in range(len(stages))]
    rows = [[part, f"{n:,}", *(f"{s[part]:,}" for s in stages)] for part, n in total.items()]
    rows.append(["all", *(f"{sum(x.values()):,}" for x in (total, *stages))])
    out.print(_table(("part", ">model", *names), rows))


def _memory(out: Console, found: Explanation) -> None:
    _head(out, "memory of a rank")
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
    out.print(_table(("tensors", *names), rows))
    out.print("not counted: the process itself, temporary tensors inside an operation", style="dim")


def _step(out: Console, found: Explanation, step: Step) -> None:
    work = step.work
    _head(out, f'a step in stage "{work.stage}": {work.objective} on {" + ".join(work.sources)}')
    out.print(
        f"{work.prompts:,} prompts, {work.candidates} candidates a pool, {work.rollouts:,} "
        f"rollouts, {work.rewrites:,} rewrites; {work.rows:,} rows = {work.row_tokens:,} positions "
        f"in {work.micro_batches} micro-batches of {work.rows_per_micro_batch} rows a replica"
    )
    for name, count in work.verdicts.items():
        out.print(
            f'verdicts of "{name}": {count:,} a step, {count * found.config.run.steps:,} a run'
        )
    total = sum(role.flops or 0 for role in step.roles)
    rows = [
        (
            r.name, r.place, count_text(r.requests), count_text(r.prompt_tokens),
            count_text(r.new_tokens), flops_text(r.flops), flops_text(r.flops_without_cache),
            "-" if r.flops is None else f"{100 * r.flops / total:.1f} %",
        )
        for r in step.roles
    ]  # fmt: skip
    columns = ("role", "on", ">requests", ">prompt tokens", ">new, at most", ">FLOPs",
               ">no prefix cache", ">share")  # fmt: skip
    out.print(_table(columns, rows))
    guessed = [name for name, measured in found.lengths.measured.items() if not measured]
    if guessed:
        out.print(f"lengths taken from the recipe's limits: {', '.join(guessed)}", style="dim")


def _bottleneck(out: Console, step: Step) -> None:
    found = step.bottleneck
    out.print(Text.assemble("expected bottleneck: ", (found.expected, "bold")))
    for reason in found.reasoning:
        out.print(f"- {reason}")
    if found.hardware is None:
        return
    rows = [
        (
            t.role,
            str(t.devices or "-"),
            "unknown" if t.seconds is None else f"{t.seconds:.3g}",
            t.bound,
        )
        for t in found.times
    ]
    out.print(_table(("role", ">GPUs", ">s a step", "limited by"), rows))
    h = found.hardware
    out.print(
        f"assumed, not measured: {h.name} with {h.bf16_flops / 1e12:,.0f} TFLOP/s bf16 "
        f"({h.fp8_flops / 1e12:,.0f} FP8) and {h.memory_bandwidth / 1e12:.2f} TB/s; used to "
        f"{h.train_utilisation:.0%} in training, {h.serve_utilisation:.0%} in serving, "
        f"{h.bandwidth_utilisation:.0%} of bandwidth; communication costs nothing"
    )


def _servers(out: Console, servers: Iterable[ServerPlan]) -> None:
    for server in servers:
        _head(out, f"server {server.name}: {server.kind}, used by {', '.join(server.users) or '-'}")
        if server.shape is None:
            out.print(f"model {server.model}: size unknown ({server.unknown}), left out of totals")
        else:
            shape = server.shape
            out.print(
                f"model {server.model}: {shape.parameters:,} parameters, "
                f"{shape.active_parameters:,} used for a token"
            )
        if server.url:
            out.print(f"at {server.url}")
            continue
        environment = [f"{k}={shlex.quote(v)}" for k, v in server.environment.items()]
        out.print(" ".join([*environment, shlex.join(server.command)]), soft_wrap=True)
        out.print(
            f"{PORT} is a free loopback port, VLLM_API_KEY a random key and TMPDIR a fresh folder, "
            "all drawn when it starts",
            style="dim",
        )


def _files(out: Console, found: Explanation) -> None:
    _head(out, f"files in {found.config.run.dir}")
    rows = [
        (f.path, f"{f.count:,}", bytes_text(f.bytes_each), bytes_text(f.bytes_total), f.note)
        for f in found.files
    ]
    out.print(_table(("file", ">number", ">each", ">together", "estimate"), rows))
