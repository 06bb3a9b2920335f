"""What verdicts and rewrites cost, from the cache that holds them: tokens, waiting, money.

Each payment counts once, also one for an answer that another process had paid for at the same
time. Failed requests and second attempts are not in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_sip.judge.cache_file import Row
from megatron_sip.judge.cache_folder import cache_paths
from megatron_sip.judge.cache_maintenance import FileState, read_rows


@dataclass(frozen=True)
class CostRow:
    """The costs of one criterion with one prompt and one model in one run."""

    run: str
    criterion: str  # or the kind, where there is no criterion, such as "rewrite"; "": unknown
    prompt: str
    model: str
    questions: int
    prompt_tokens: int
    completion_tokens: int
    latency_sum_s: float
    latency_median_s: float
    latency_p95_s: float
    money: float | None  # in the unit of the prices; None: no price for this model


@dataclass
class _Sums:
    questions: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)


def cost_report(
    folder: Path, run: str = "", *, prices: Mapping[str, tuple[float, float]] | None = None
) -> list[CostRow]:
    """Costs by run, criterion, prompt and model, sorted by these.

    Args:   run: that paid; "": all runs, and what was stored without costs (all names "").
            prices: of 10^6 prompt and 10^6 completion tokens, by model.
    Raises: ValueError if there is no folder, a file is of another schema version, or a price is
            of a model that was never paid.
    """
    sums: dict[tuple[str, str, str, str], _Sums] = {}
    seen: set[tuple[int, float]] = set()  # a row stands in two files after a repair
    for path in cache_paths(folder):
        for row in read_rows(FileState(path), check=False):
            payment = (row.checksum, row.stored_unix_s)
            if payment in seen or (run and row.run != run):
                continue
            seen.add(payment)
            _add(sums.setdefault(_names(row), _Sums()), row)
    prices = prices or {}
    models = {names[3] for names in sums}
    if unknown := sorted(prices.keys() - models):
        raise ValueError(
            f"prices name {', '.join(unknown)}, but the models are {', '.join(sorted(models))}"
        )
    return [_row(names, sums[names], prices=prices) for names in sorted(sums)]


def text(rows: Sequence[CostRow]) -> str:
    """A table for reading, with a line of sums."""
    money = any(row.money is not None for row in rows)
    head = ["run", "criterion", "prompt", "model", "questions", "prompt tokens"]
    head += ["completion tokens", "latency s", "median s", "p95 s", *(["money"] if money else [])]
    table = [head] + [[*map(_shown, _cells(row, money=money))] for row in rows]
    priced = [row.money for row in rows if row.money is not None]
    total = ["in all", "", "", "", _shown(sum(r.questions for r in rows))]
    total += [_shown(sum(r.prompt_tokens for r in rows))]
    total += [_shown(sum(r.completion_tokens for r in rows))]
    total += [_shown(sum(r.latency_sum_s for r in rows)), "", ""]
    table.append(total + ([_shown(sum(priced))] if money else []))
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def _names(row: Row) -> tuple[str, str, str, str]:
    return row.run or "", row.criterion or row.kind or "", row.prompt or "", row.model or ""


def _add(sums: _Sums, row: Row) -> None:
    sums.questions += 1
    sums.prompt_tokens += row.prompt_tokens or 0
    sums.completion_tokens += row.completion_tokens or 0
    if row.latency_s is not None:
        sums.latencies_s.append(row.latency_s)


def _row(
    names: tuple[str, str, str, str], sums: _Sums, *, prices: Mapping[str, tuple[float, float]]
) -> CostRow:
    median, p95 = np.percentile(sums.latencies_s or [0.0], [50, 95])
    money = None
    if names[3] in prices:
        asked, answered = prices[names[3]]
        money = (asked * sums.prompt_tokens + answered * sums.completion_tokens) / 1e6
    return CostRow(
        *names,
        questions=sums.questions,
        prompt_tokens=sums.prompt_tokens,
        completion_tokens=sums.completion_tokens,
        latency_sum_s=sum(sums.latencies_s),
        latency_median_s=float(median),
        latency_p95_s=float(p95),
        money=money,
    )


def _cells(row: CostRow, *, money: bool) -> list[str | int | float | None]:
    names: list[str | int | float | None] = [row.run, row.criterion, row.prompt, row.model]
    names += [row.questions, row.prompt_tokens, row.completion_tokens]
    names += [row.latency_sum_s, row.latency_median_s, row.latency_p95_s]
    return [*names, row.money] if money else names


def _shown(value: str | int | float | None) -> str:
    """What is not printable stands as an escape; "-" for what is unknown."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value) or "-"
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
