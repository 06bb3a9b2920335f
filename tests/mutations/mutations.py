"""Breakages that the lessons of other systems name, and the test that must catch each."""

from __future__ import annotations

from dataclasses import dataclass

OBJECTIVES, PAIRS = "tests/unit/test_objectives.py", "tests/unit/test_objectives_pairs.py"
GRPO, ROWS = "tests/unit/test_objectives_grpo.py", "tests/unit/test_rows.py"
BRANCHES, HEAD = "tests/unit/test_branch_attention.py", "tests/unit/test_loss_head.py"
PARITY, STEP = "tests/distributed/test_parity.py", "tests/distributed/test_step.py"
REFERENCE = "tests/distributed/test_reference.py"
HEAD_RANKS = "tests/distributed/test_loss_head_parallel.py"


@dataclass(frozen=True)
class Mutation:
    """One change of one file of the package."""

    name: str
    file: str
    old: str
    """Stands there exactly once."""
    new: str
    caught_by: str
    """Test file, relative to the project."""
    chosen: str = ""
    """pytest -k, where the whole file would take long."""


def at(layout: str, case: str) -> str:
    return f"test_loss and {layout} and {case} and not shared and not mbs"


MUTATIONS = (
    Mutation("sign of the DPO margin", "objectives/pairs.py",
             "scores_M[chosen_Q] - scores_M[rejected_Q]",
             "scores_M[rejected_Q] - scores_M[chosen_Q]", OBJECTIVES),
    Mutation("best and worst exchanged", "objectives/pairs.py",
             "(allowed[-1 - q], low, _is_live(", "(low, allowed[-1 - q], _is_live(", PAIRS),
    Mutation("dead pairs count in the denominator", "objectives/pairs.py",
             "(live_Q > 0).sum(), 1.0", "(live_Q >= 0).sum(), 1.0", OBJECTIVES),
    Mutation("length of a padded row in place of a candidate's", "objectives/terms.py",
             "segment_sums(values_RS, rows) / segment_lengths(rows).clamp(min=1)",
             "segment_sums(values_RS, rows) / rows.labels.shape[1]", OBJECTIVES),
    Mutation("mask off by one", "rows.py",
             "self.segment_ids[row, where] = m", "self.segment_ids[row, where.start + 1 :] = m",
             ROWS),
    Mutation("labels not shifted", "rows.py",
             "self.labels[row, where] = ids[1:]", "self.labels[row, where] = ids[:-1]", ROWS),
    Mutation("pair parted: rejected joins another pool's pair", "rows.py",
             "self.pairs[-1].append(m)", "self.pairs[0].append(m)", ROWS),
    Mutation("wrong branch positions", "rows.py",
             "position=before, branch=number", "position=column, branch=number", ROWS),
    Mutation("leak between branches", "branch_attention.py",
             "seen = (same | (branch_ids == 0)[:, None, :]) & causal", "seen = causal & True",
             BRANCHES),
    Mutation("branch does not see its prefix", "branch_attention.py",
             "seen = (same | (branch_ids == 0)[:, None, :]) & causal", "seen = same & causal",
             BRANCHES),
    Mutation("advantage over dead members", "objectives/grpo.py",
             "valid = [i for i in members if reward.valid[i]]", "valid = list(members)", GRPO),
    Mutation("suffix and rewrite in the group", "objectives/grpo.py",
             'if c.source == "rollout"]', "if c.source]", GRPO),
    Mutation("clipping of losses, too (maximum for minimum)", "objectives/grpo.py",
             "torch.minimum(ratio_RS", "torch.maximum(ratio_RS", GRPO),
    Mutation("ratio to the reference in place of the engine", "objectives/grpo.py",
             "logprobs_RS - rows.rollout_logprobs", "logprobs_RS - rows.reference_logprobs", GRPO),
    Mutation("KL of the other direction", "objectives/grpo.py",
             "rows.reference_logprobs - logprobs_RS", "logprobs_RS - rows.reference_logprobs",
             GRPO),
    Mutation("softmax without the running maximum", "loss_head.py",
             "total.mul_(shift.exp())", "total.mul_(1)", HEAD),
    Mutation("local in place of global mean", "objectives/terms.py",
             "t.weight / max(global_counts[t.name], 1.0)", "t.weight / max(float(t.count), 1.0)",
             PARITY, at("TP1PP1DP2", "dpo_two_pairs")),
    Mutation("doubled loss", "learner.py",
             "return scaled * counts[TOKENS]", "return scaled * 2 * counts[TOKENS]",
             PARITY, at("TP1PP1DP1", "rf_nll_tied")),
    Mutation("missing tensor-parallel sum of the hidden states' gradient", "gpt.py",
             "hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)",
             "hidden = hidden_states", PARITY, at("TP2PP1DP1", "rf_nll_tied")),
    Mutation("missing tensor-parallel sum in the softmax", "loss_head.py",
             "    dist.all_reduce(sums[1:], group=group)\n", "", HEAD_RANKS, "two_slices"),
    Mutation("gradient norm counts slices on one rank only", "model.py",
             "parameter.tensor_model_parallel = True", "parameter.tensor_model_parallel = False",
             PARITY, at("TP2PP1DP1", "rf_nll_tied")),
    Mutation("positions counted, not read", "forward.py",
             "position_ids=rows.position_ids.expand(3, -1, -1)",
             "position_ids=torch.arange(rows.tokens.shape[1]).expand(3, *rows.tokens.shape)",
             PARITY, "test_loss and TP1PP1DP1 and dpo_tied_shared"),
    Mutation("reference scored differently", "forward.py",
             "replace(b, reference_logprobs=lp)", "replace(b, reference_logprobs=lp.bfloat16())",
             STEP, "margin and TP1PP1DP1"),
    Mutation("NaN reaches the optimizer", "learner.py",
             "if math.isinf(maximum(abs(loss) + norm, self.platform)):", "if False:",
             STEP, "harm and nan and DP2"),
    Mutation("reference of other kernels than the policy", "model.py",
             "    return reference.eval()", "    return reference.requires_grad_(False).eval()",
             STEP, "exactly_zero and TP2PP1DP1 and dpo_shared"),
    Mutation("engine's log-probs not taken as reference", "learner.py",
             "replace(b, reference_logprobs=b.rollout_logprobs)",
             "replace(b, reference_logprobs=0 * b.rollout_logprobs)",
             PARITY, at("TP1PP1DP1", "dpo_engine")),
    Mutation("snapshot taken a step late", "reference.py",
             "run.state.step % settings.interval == 0", "run.state.step % settings.interval == 1",
             REFERENCE, "snapshots and TP2PP2DP1"),
    Mutation("version moves on with a skipped step", "step.py",
             "policy_version=state.policy_version + (not skipped)",
             "policy_version=state.policy_version + 1", REFERENCE, "skipped_on and TP1PP1DP2"),
    Mutation("skipped steps counted over good ones", "step.py",
             "state.skipped_in_a_row + 1 if skipped else 0", "state.skipped_in_a_row + skipped",
             REFERENCE, "skipped_on and TP1PP1DP2"),
    Mutation("a gate stops nobody", "judge/scoring.py",
             "passes_C &= score_C >= criterion.gate", "passes_C &= score_C > -np.inf",
             "tests/unit/test_judge_scoring.py"),
    Mutation("a missing verdict counts as one", "judge/scoring.py",
             "present_C[candidate] += verdict.score is not None", "present_C[candidate] += 1",
             "tests/unit/test_judge_scoring.py"),
    Mutation("verdict of the other order not turned", "judge/asking.py",
             "score=1.0 - value if flip else value", "score=value",
             "tests/unit/test_judge_judge.py"),
    Mutation("orders that disagree are no tie", "judge/pair_scores.py",
             "return 0.5 if len(values) == 2 and _disagree(*values) else fmean(values)",
             "return fmean(values)", "tests/unit/test_judge_pair_scores.py"),
    Mutation("what a candidate writes becomes a special token", "judge/text_model.py",
             "trusted=not is_field", "trusted=True", "tests/unit/test_judge_attacks.py"),
    Mutation("what failed before an outage is not asked again", "judge/judge.py",
             "answers.pop(n, None)", "pass", "tests/unit/test_judge_outages.py"),
)  # fmt: skip


def table() -> str:
    """Markdown: what is broken where, and what catches it."""
    rows = [f"| {m.name} | `{m.file}` | `{m.caught_by}` |" for m in MUTATIONS]
    return "\n".join(["| breakage | file | caught by |", "|---|---|---|", *rows])
