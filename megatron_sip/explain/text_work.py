"""Work, servers and files of an explanation as printed text."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from megatron_sip.explain.numbers import bytes_text, count_text, flops_text
from megatron_sip.explain.plan import Explanation, Step
from megatron_sip.explain.servers import PORT, ServerPlan
from megatron_sip.explain.tables import head, table


def print_step(out: Console, found: Explanation, step: Step) -> None:
    """Pools, verdicts and rows of a step, and its work by role."""
    work = step.work
    head(out, f'a step in stage "{work.stage}": {work.objective} on {" + ".join(work.sources)}')
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
    out.print(table(columns, rows))
    run = flops_text(total * found.config.run.steps)
    out.print(f"known together: {flops_text(total)} a step, {run} if the whole run were such steps")
    guessed = [name for name, measured in found.lengths.measured.items() if not measured]
    if guessed:
        out.print(f"lengths taken from the recipe's limits: {', '.join(guessed)}", style="dim")


def print_bottleneck(out: Console, step: Step) -> None:
    """What the step waits for and why; on GPUs seconds by role and what they assume."""
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
    out.print(table(("role", ">GPUs", ">s a step", "limited by"), rows))
    h = found.hardware
    out.print(
        f"assumed, not measured: {h.name} with {h.bf16_flops / 1e12:,.0f} TFLOP/s bf16 "
        f"({h.fp8_flops / 1e12:,.0f} FP8) and {h.memory_bandwidth / 1e12:.2f} TB/s; used to "
        f"{h.train_utilisation:.0%} in training, {h.serve_utilisation:.0%} in serving, "
        f"{h.bandwidth_utilisation:.0%} of bandwidth; communication costs nothing"
    )


def print_servers(out: Console, servers: Iterable[ServerPlan]) -> None:
    """Each server with its model, its users and the command that starts it."""
    for server in servers:
        head(out, f"server {server.name}: {server.kind}, used by {', '.join(server.users) or '-'}")
        if server.shape is None:
            out.print(f"model {server.model}: size unknown ({server.unknown}), left out of totals")
        else:
            shape = server.shape
            out.print(
                f"model {server.model}: {shape.parameters:,} parameters, "
                f"{shape.active_parameters:,} used for a token"
                + (f", weights {bytes_text(server.weights)}" if server.weights else "")
                + (f" over {len(server.gpus)} GPUs" if server.gpus else "")
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


def print_files(out: Console, found: Explanation) -> None:
    """What the run will write."""
    head(out, f"files in {found.config.run.dir}")
    rows = [
        (f.path, f"{f.count:,}", bytes_text(f.bytes_each), bytes_text(f.bytes_total), f.note)
        for f in found.files
    ]
    out.print(table(("file", ">number", ">each", ">together", "estimate"), rows))
