"""Benchmark `judge-schedules`: what a schedule keeps of all pairs, and what it asks.

Simulated judges on simulated pools; schedules and scores are the trainer's own code. A pool has C
true utilities u ~ N(0, 1). The judge's P(i beats j), i presented first, is

    sigma(u_i - u_j + noise_ij + cycle_ij + bias),  noise and cycle antisymmetric,

drawn once a pool, so that every schedule meets the same judge. Cells, each with one flaw at most:
noise_free; noise_1 and noise_2, noise of standard deviation 1 and 2, in units of utility;
order_bias, 1 for who is presented first; intransitive, cycle_ij = (a_i b_j - b_i a_j) / sqrt(2)
with a, b ~ N(0, 1), which has standard deviation 1. Beside them, and in no ratio: `sampled`,
noise_1 with verdicts of 0 or 1 drawn from these probabilities, as a judge that reasons gives;
C = 16 only.

The gap is u[candidate of the highest score] - u[candidate of the lowest]: the contrast that DPO
trains on. A share is a schedule's mean gap over that of all pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.config_judge import (
    Adaptive,
    AllPairs,
    Bracket,
    PairwiseCriterion,
    Pivot,
    RandomPairs,
    Schedule,
)
from megatron_sip.judge.pair_scores import pair_scores, pair_table
from megatron_sip.judge.schedules import next_questions
from megatron_sip.types import Verdict

PROMPTS, SIZES, SEED = 3_000, (8, 16), 11
CELLS = ("noise_free", "noise_1", "noise_2", "order_bias", "intransitive")
SAMPLED = "sampled"
SETTINGS: dict[str, Schedule] = {
    "all_pairs": AllPairs(name="all_pairs"),
    "random_pairs": RandomPairs(name="random_pairs"),
    "pivot": Pivot(name="pivot"),
    "bracket": Bracket(name="bracket"),
    "adaptive": Adaptive(name="adaptive"),
    "adaptive_50": Adaptive(name="adaptive", budget=0.5),
}
CRITERION = PairwiseCriterion(form="pairwise", name="q", server="s", prompt="p")


def run(prompts: int = PROMPTS) -> dict[str, Any]:
    """Mean gaps, questions and shares by size, schedule and cell; ratios of adaptive at C = 16.

    Args: prompts: pools of each cell.
    """
    results: dict[str, Any] = {}
    for size in SIZES:
        for cell in (*CELLS, SAMPLED) if size == max(SIZES) else CELLS:
            results |= _cell(cell, size, prompts)
    shares = [results[f"c16_adaptive_{cell}_share"] for cell in CELLS]
    ratios = {
        "gap_share_mean": float(np.mean(shares)),
        "gap_share_worst": min(shares),
        "question_share": results["c16_adaptive_questions"] / results["c16_all_pairs_questions"],
    }
    settings = {"prompts": prompts, "candidates": list(SIZES), "both_orders": 0, "seed": SEED}
    return {"name": "judge-schedules", "settings": settings, "results": results, "ratios": ratios}


def _cell(cell: str, size: int, prompts: int) -> dict[str, Any]:
    """Every schedule on the same pools of one cell: mean gap, its standard error, its share."""
    gaps = {name: np.zeros(prompts) for name in SETTINGS}
    questions: dict[str, int] = {}
    for prompt in range(prompts):
        utility, chance = pool(cell, size, prompt)
        for name, schedule in SETTINGS.items():
            gaps[name][prompt], questions[name] = judged(schedule, utility, chance, prompt)
    full = gaps["all_pairs"].mean()
    found: dict[str, Any] = {}
    for name, gap in gaps.items():
        key = f"c{size}_{name}"
        found[f"{key}_questions"] = questions[name]
        found[f"{key}_{cell}_gap"] = float(gap.mean())
        found[f"{key}_{cell}_share"] = float(gap.mean() / full)
        apart = gap / full - gaps["all_pairs"] * gap.mean() / full**2  # delta method
        found[f"{key}_{cell}_share_error"] = float(apart.std() / np.sqrt(prompts))
    return found


def pool(cell: str, size: int, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """Utilities float64[C] and P(row beats column | row is presented first) float64[C, C]."""
    names = (*CELLS, SAMPLED)
    rng = np.random.default_rng([SEED, names.index(cell), size, prompt])
    utility, a, b = rng.normal(size=(3, size))
    noise = np.triu(rng.normal(size=(size, size)), 1)
    logits = utility[:, None] - utility[None, :]
    logits += {"noise_1": 1.0, SAMPLED: 1.0, "noise_2": 2.0}.get(cell, 0.0) * (noise - noise.T)
    if cell == "intransitive":
        logits += (np.outer(a, b) - np.outer(b, a)) / np.sqrt(2)
    if cell == "order_bias":
        logits += 1.0
    chance = 1 / (1 + np.exp(-logits))
    if cell == SAMPLED:  # the two orders of a pair give the same verdict
        drawn = np.triu(rng.random((size, size)) < chance, 1).astype(float)
        chance = drawn + np.tril(1 - drawn.T, -1)
    return utility, chance


def judged(
    schedule: Schedule, utility: np.ndarray, chance: np.ndarray, seed: int
) -> tuple[float, int]:
    """Gap between picked best and worst in utility units, and the number of questions asked."""
    verdicts: list[Verdict] = []
    size = len(utility)
    while asked := next_questions(schedule, verdicts, size, seed, criteria=(CRITERION,)):
        for q in asked:
            i, j = q.candidate, q.opponent
            score = float(chance[i, j] if q.candidate_first else 1 - chance[j, i])
            verdicts.append(Verdict(q.criterion, i, j, q.vote, score, "", q.candidate_first))
    scores = pair_scores(schedule, pair_table(verdicts, size))
    return float(utility[scores.argmax()] - utility[scores.argmin()]), len(verdicts)


def plot(found: dict[str, Any], path: Path) -> None:
    """Questions against the share of the gap at C = 16, a panel for each cell.

    Args: found: of `run`. path: of the PNG to write.
    """
    from matplotlib.figure import Figure

    results = found["results"]
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for axis, cell in zip(axes.flat, (*CELLS, SAMPLED), strict=True):
        for marker, name in zip("so^vDP", SETTINGS, strict=True):
            questions = results[f"c16_{name}_questions"]
            share = results[f"c16_{name}_{cell}_share"]
            axis.plot(questions, share, marker, markersize=8, label=name.replace("_", " "))
        axis.axhline(1.0, color="0.7", linewidth=1, zorder=0)
        axis.set_title(cell.replace("_", " "))
        axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("questions a pool (C = 16)")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of all pairs' gap")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=110)
