"""Breakages that the lessons of other systems name, and the test that must catch each."""

from __future__ import annotations

from dataclasses import dataclass

OBJECTIVES, PAIRS = "tests/unit/test_objectives.py", "tests/unit/test_objectives_pairs.py"
GRPO, ROWS = "tests/unit/test_objectives_grpo.py", "tests/unit/test_rows.py"
BRANCHES, HEAD = "tests/unit/test_branch_attention.py", "tests/unit/test_loss_head.py"
PARITY, STEP = "tests/distributed/test_parity.py", "tests/distributed/test_step.py"
REFERENCE = "tests/distributed/test_reference.py"
CHECKPOINT = "tests/distributed/test_checkpoint.py"
HEAD_RANKS = "tests/distributed/test_loss_head_parallel.py"
CONVERSION = "tests/distributed/test_conversion.py"


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
    Mutation("fused attention silently given up", "branch_attention.py",
             "torch.compile(flex_attention, fullgraph=True)",
             "torch.compile(flex_attention)", BRANCHES),
    Mutation("attention's kernel for decoding", "branch_attention.py",
             '{"FORCE_USE_FLEX_ATTENTION": True}', "{}", BRANCHES),
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
    Mutation("a rollout server serves without an exchange of weights", "serving/supervisor.py",
             'self._move(name, "stale" if name in self._policy else "serving")',
             'self._move(name, "serving")', "tests/unit/test_supervisor.py"),
    Mutation("old news of a server that came back counts again", "supervision/heartbeat.py",
             "self._gone.get(server, 0) > self._mourned.get(server, 0)",
             "self._gone.get(server, 0) > 0", "tests/unit/test_supervision.py"),
    Mutation("a wait is measured by the time of day", "supervision/monitor.py",
             "clock: Callable[[], float] = time.monotonic",
             "clock: Callable[[], float] = lambda: time.time()",
             "tests/unit/test_supervision.py", "clock_that_jumps"),
    Mutation("a restart takes over another launch's run", "supervision/restarts.py",
             'launch.attempt == 0 or known.get("owner") != launch.owner', "launch.attempt == 0",
             "tests/unit/test_supervision.py", "only_a_restart"),
    Mutation("a server of another model is taken over", "serving/adoption.py",
             'known["model"] != model_signature(model_dir)', "False",
             "tests/unit/test_adoption.py", "otherwise"),
    Mutation("a prefix wanders between rollout servers", "rollout/vllm_engine.py",
             "return sample_id % num_servers", "return 0", "tests/unit/test_vllm_engine.py"),
    Mutation("rollouts of weights that nobody published", "rollout/vllm_engine.py",
             "if not self.weight_version:", "if False:", "tests/unit/test_vllm_engine.py"),
    Mutation("an update of two halves is taken", "rollout/ledger.py",
             "if self._found.digest != bucket.whole:", "if False:",
             "tests/unit/test_exchange_faults.py", "ten_thousand"),
    Mutation("buckets in any order", "rollout/ledger.py",
             "bucket.index != expected or", "False or", "tests/unit/test_ledger.py"),
    Mutation("stale weights under a new version", "rollout/ledger.py",
             "and bucket.version > self.version and not bucket.may_equal", "and False",
             "tests/unit/test_shared_memory.py"),
    Mutation("a server's yes is believed", "rollout/shared_memory.py",
             "        self._check_receipts(self._control, receipt)\n", "",
             "tests/unit/test_shared_memory.py"),
    Mutation("tensors of an unfinished layer are overwritten", "rollout/bucket_file.py",
             "if data is not None:", "if False:", "tests/unit/test_bucket_file.py"),
    Mutation("half-updated servers are taken back", "rollout/control.py",
             "broken=self._open.union(broken)", "broken=broken",
             "tests/unit/test_rollout_control.py", "must_be_restarted"),
    Mutation("what the next step changes is written", "checkpoint_writing.py",
             "return data.clone() if changing and not", "return data.clone() if False and not",
             CHECKPOINT, "state_at_the_save"),
    Mutation("what was written is not compared with the disk", "checkpoint_writing.py",
             "if self.digests[self._name] != written:", "if False:",
             CHECKPOINT, "cannot_be_written"),
    Mutation("a rank's failure to write is forgotten", "checkpoint_writing.py",
             "failure = self.failure or self._written.exception()", "failure = None",
             CHECKPOINT, "cannot_be_written"),
    Mutation("any class is unpickled", "unpickling.py",
             "if (module, name) not in self._known:", "if False:",
             "tests/unit/test_unpickling.py"),
    Mutation("an FP8 state's own pickle is not looked at", "unpickling.py",
             "unpickle(state.numpy().tobytes(), FP8_STATE)", "pass",
             "tests/unit/test_unpickling.py"),
    Mutation("code deep in a model's settings is overlooked", "model_folder.py",
             "found.update(key for key, value in pairs if key in KEYS and value)", "pass",
             "tests/unit/test_model_folder.py"),
    Mutation("pools that a checkpoint would replay are removed", "disk.py",
             "before=min(oldest, newest - config.run.keep_pools)",
             "before=newest - config.run.keep_pools", "tests/unit/test_disk.py"),
    Mutation("open control routes of another host are accepted", "serving/exposure.py",
             "if status not in (401, 403, 404):", "if False:",
             "tests/unit/test_serving_exposure.py"),
    Mutation("padding of the vocabulary has a part in the softmax", "loss_head.py",
             "ctx.used = max(0, min(len(weight), vocabulary - first))", "ctx.used = len(weight)",
             HEAD, "padding"),
    Mutation("padding of the vocabulary is exported", "rollout/weight_source.py",
             "if entry.padded:", "if False:", CONVERSION, "folder_read and TP2PP2"),
    Mutation("long waves are not slowed down", "model.py",
             "if model.rope_scaling is not None:", "if False:",
             CONVERSION, "folder_read and TP2PP2"),
    Mutation("keys and values of a slice exchanged", "convert/names.py",
             "torch.cat(grouped, dim=1)", "torch.cat(grouped[:1] + grouped[:0:-1], dim=1)",
             CONVERSION, "folder_read and TP2PP2"),
    Mutation("unknown parameter of a folder is passed over", "convert/load.py",
             "    if unknown:", "    if False:", "tests/unit/test_conversion_tensors.py"),
)  # fmt: skip


def table() -> str:
    """Markdown: what is broken where, and what catches it."""
    rows = [f"| {m.name} | `{m.file}` | `{m.caught_by}` |" for m in MUTATIONS]
    return "\n".join(["| breakage | file | caught by |", "|---|---|---|", *rows])
