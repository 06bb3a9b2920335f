"""A whole run: set-up in order of cost, the loop, what happens at its end."""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sip import checkpoint, checkpoint_files, parallel
from megatron_sip.assembly import build_run, connect_servers, open_data
from megatron_sip.config import Config
from megatron_sip.console import Console, SilentConsole, setup_logging
from megatron_sip.cost import used
from megatron_sip.disk import shortage, tidy
from megatron_sip.errors import RunFailed, StepAbandoned, refuse
from megatron_sip.evaluation.evaluate import Evaluator, PolicyOutput, as_metrics, compare
from megatron_sip.evaluation.saved import load_output, save_output, start_file
from megatron_sip.explain.plan import explain
from megatron_sip.learner import StepStopped
from megatron_sip.lifetime import Stopped, StopRequest, die_with_parent
from megatron_sip.metrics import MetricLogger
from megatron_sip.model import frozen_copy, is_spread
from megatron_sip.parallel import Ranks
from megatron_sip.platform import PLATFORMS
from megatron_sip.recovery import publish, with_servers
from megatron_sip.reference import save_reference
from megatron_sip.report import write_report
from megatron_sip.resume import restore
from megatron_sip.run_dir import create_run_dir, write_summary
from megatron_sip.sinks.opening import open_logger
from megatron_sip.sinks.progress import Progress
from megatron_sip.step import Run, run_step
from megatron_sip.supervision import restarts
from megatron_sip.supervision.heartbeat import HEART
from megatron_sip.supervision.monitor import last_words
from megatron_sip.supervision.restarts import Launch
from megatron_sip.supervision.run_lock import RunInUse, hold
from megatron_sip.supervision.watched import watched
from megatron_sip.trust.alarm import Alarm

log = logging.getLogger(__name__)


def train(
    config: Config, launch: Launch, *, pools_dir: Path | None, resume: bool, begun: bool
) -> None:
    """Run the recipe to its end, from step 0 or from the latest checkpoint; every rank calls it.

    Args:   pools_dir: pools/ of another run to learn from instead of asking servers.
            resume: go on with the run in run.dir.
            begun: run.dir is of an earlier attempt of this launch; without `resume` what it left
            there is removed.
    Raises: ValueError for what is wrong and `preflight` could not see, before servers start;
            RunInUse if another run has run.dir;
            Stopped once SIGTERM or SIGINT was obeyed; PeerLost if another rank died.
    """
    started = time.monotonic()
    die_with_parent()
    if int(os.environ.get("RANK", "0")) == 0 and not begun:  # servers may still be there
        refuse_unfit(config, replay=pools_dir is not None)
    tokenizer, datasets = open_data(config)
    platform = PLATFORMS[config.platform.kind](config.platform)
    ranks = parallel.initialize(config.parallel, platform, seed=config.run.seed)
    prepare_run_dir(config, ranks, launch, resume=resume, begun=begun)
    setup_logging(config.run.dir, rank=ranks.rank)
    with ExitStack() as stack:
        console = SilentConsole()
        if ranks.is_main:
            console = Console(config.run.steps, title=f"{config.run.task}: {config.run.dir}")
        stack.enter_context(console)
        stack.enter_context(watched(config, ranks, launch, console))
        run = build_run(config, platform, ranks, tokenizer, datasets, console, stack, resume=resume)
        if resume:
            restore(run)
        progress = Progress(lambda: run.timer.current)
        logger = None
        if ranks.is_main:
            logger = open_logger(config, progress, console.note, after=run.state.step)
            stack.enter_context(logger)
        words = last_words(HEART, config.run.dir / restarts.RECORDS, launch.peers)
        with progress, words:  # they know the end before servers and sinks are closed
            evaluators = connect_servers(run, tokenizer, datasets, pools_dir, stack)
            starts = begin(run, evaluators, resume)
            train_steps(run, evaluators, starts, logger)
            finish(run, evaluators, starts, started)


def refuse_unfit(config: Config, *, replay: bool) -> None:
    """Raises: ValueError if documents, requests or the run itself do not fit where they go."""
    refuse(explain(config, servers_start=not replay).unfit)


def prepare_run_dir(
    config: Config, ranks: Ranks, launch: Launch, *, resume: bool, begun: bool
) -> None:
    """Rank 0 makes the run directory or takes it over; all ranks learn whether it could.

    Raises: RunInUse if another process has it; ValueError for what else is wrong with it.
    """
    problem = None
    if ranks.is_main:
        try:
            hold(config.run.dir)
            if resume:
                restarts.claim(config.run.dir, launch)
            else:
                create_run_dir(config.run.dir, config, launch, begun=begun)
        except RunInUse as error:
            problem = error
        except (OSError, ValueError) as error:
            problem = ValueError(str(error))
    problem = parallel.broadcast_object(problem)
    if problem is not None:
        raise problem


def begin(run: Run, evaluators: dict[str, Evaluator], resume: bool) -> dict[str, PolicyOutput]:
    """The start policy, kept and evaluated on each split; a resumed run reads both back.

    Returns: by split on rank 0, nothing elsewhere.
    """
    config, run_dir = run.config, run.config.run.dir
    files = {split: start_file(run_dir, split) for split in evaluators}
    if resume:
        again = max(0, run.replay_until - run.state.step)
        run.console.note(
            f"resumed after step {run.state.step}"
            + (f"; {again} steps are learned again from recorded pools" if again else "")
        )
        return {s: load_output(f) for s, f in files.items()} if run.ranks.is_main else {}
    if run.exchange is not None:
        run.start_policy = frozen_copy(
            run.learner.policy, config, run.platform, vocab_size=run.vocab_size
        )
    starts = {}
    for split, evaluator in evaluators.items():
        output = measure(run, evaluator, f"evaluating the start policy on {split}")
        if output is not None:
            save_output(files[split], output)
            starts[split] = output
    if config.run.task == "sip":  # last: from here on there is something to go on from
        checkpoint.save_weights(
            run_dir,
            0,
            module=run.learner.policy.module,
            identity=run.identity,
            state=run.state,
        )
    return starts


def train_steps(
    run: Run,
    evaluators: dict[str, Evaluator],
    starts: dict[str, PolicyOutput],
    logger: MetricLogger | None,
) -> None:
    """The loop: steps, checkpoints, evaluations, metrics, and the wish to stop.

    Args:   logger: on rank 0.
    Raises: Stopped, on every rank, after a checkpoint.
    """
    config = run.config
    HEART.beat(step=run.state.step + 1)
    run.timer.take()  # what came before the first step
    trust = config.judge.trust if config.judge else None
    alarm = Alarm(trust.window) if trust else None
    begun = time.perf_counter()
    with StopRequest() as request:
        while run.state.step < config.run.steps:
            refuse_to_spend(run)
            refuse_to_fill(run)
            metrics = make_step(run)
            signum = int(parallel.maximum(request.signum, run.platform))
            last = run.state.step == config.run.steps
            if signum:
                request.granted()
            else:
                metrics |= evaluate_now_and_then(run, evaluators, starts)
            metrics |= run.timer.take() | {"time/step_s": time.perf_counter() - begun}
            begun = time.perf_counter()  # a checkpoint counts to the step after it
            if logger is not None:
                metrics |= sound(run, alarm, metrics)
                metrics |= used(
                    config, metrics,
                    servers=run.exchange is not None, device_name=run.platform.device_name(),
                )  # fmt: skip
                replayed = run.state.step <= run.replay_until
                logger.log(run.state.step, metrics, replayed=replayed)
                run.console.step(run.state.step, metrics)
            settle(run, wait=False)  # only now: a step that is saved has its line
            if last or signum or run.state.step % config.checkpoint.interval == 0:
                save(run)
            if last or signum:
                settle(run)
            if signum and not last:
                raise Stopped(signum, step=run.state.step)
            HEART.beat(step=run.state.step + 1)


def sound(run: Run, alarm: Alarm | None, metrics: dict[str, float]) -> dict[str, float]:
    """judge/alarm, and a word on the terminal where it is not 0."""
    if alarm is None:
        return {}
    found = alarm.heard(metrics)
    for sentence in found:
        log.warning(sentence)
        run.console.note(f"alarm: {sentence}")
    return {"judge/alarm": float(len(found))}


def make_step(run: Run) -> dict[str, float]:
    """One step; if it cannot be made, what is trained so far is saved before the run stops."""
    try:
        return run_step(run)
    except StepAbandoned:
        save_once(run)
        raise
    except StepStopped:
        settle(run)
        raise


def refuse_to_spend(run: Run) -> None:
    """Raises: RunFailed on every rank, after a checkpoint, once judge.limit is reached."""
    limit = run.config.judge.limit.model_dump() if run.config.judge else {}
    for name, most in limit.items():
        spent = run.state.spent.get(name, 0.0)
        if most is not None and spent >= most:
            save_once(run)
            raise RunFailed(
                f"judge.limit.{name}: {spent:,.6g} are spent after step {run.state.step}, the "
                f"limit is {most:,.6g}; raise it and go on with --resume"
            )


def refuse_to_fill(run: Run) -> None:
    """Raises: RunFailed on every rank, after a checkpoint, before disk or run.max_gib is full."""
    message, step = "", run.state.step
    if run.ranks.is_main and run.pending is None:
        size = checkpoint_files.checkpoint_bytes(run.config.run.dir)
        message = shortage(run.config, step=step, checkpoint=size or first_checkpoint_bytes(run))
    if message := parallel.shared_failure(message, run.platform):
        save_once(run)
        raise RunFailed(f"stopped after step {step}: {message}, and go on with --resume")


def first_checkpoint_bytes(run: Run) -> int:
    """Weights, and in fp32 main weights and two moments, of all model-parallel ranks."""
    module, p = run.learner.policy.module, run.config.parallel
    held = sum(
        x.numel() * (x.element_size() + 12) * (p.expert_model_parallel_size if is_spread(x) else 1)
        for x in module.parameters()
    )
    return held * p.tensor_model_parallel_size * p.pipeline_model_parallel_size


def save_once(run: Run) -> None:
    """Checkpoint of the present state, if there is none."""
    settle(run)
    folder = checkpoint_files.step_folder(run.config.run.dir, run.state.step)
    if run.state.step and not parallel.broadcast_object(checkpoint_files.is_complete(folder)):
        save(run)
        settle(run)


def evaluate_now_and_then(
    run: Run, evaluators: dict[str, Evaluator], starts: dict[str, PolicyOutput]
) -> dict[str, float]:
    """eval/* on validation prefixes where this step is due, on rank 0; draws nothing that counts.

    Steps that a resumed run replays are not evaluated: the servers do not have their weights.
    """
    step, interval = run.state.step, run.config.evaluation.interval
    if not interval or step % interval or step < run.replay_until or not evaluators:
        return {}
    now = measure(run, evaluators["validation"], f"evaluating on validation after step {step}")
    if now is None:
        return {}
    return as_metrics(compare(starts["validation"], now, run.config.evaluation))


def finish(
    run: Run,
    evaluators: dict[str, Evaluator],
    starts: dict[str, PolicyOutput],
    started: float,
) -> None:
    """Evaluate the end policy on test prefixes and sum up."""
    config = run.config
    if run.exchange is not None and run.exchange.version != run.state.policy_version:
        publish(run)  # the last steps were not sent
    result = {}
    if evaluators:
        end = measure(run, evaluators["test"], "evaluating the end policy on test")
        if end is not None:
            result = compare(starts["test"], end, config.evaluation)
    if run.ranks.is_main:
        write_summary(config.run.dir, summary(run, result, time.monotonic() - started))
        report(run)
        run.console.note(f"done: {config.run.dir}/summary.json")
    dist.barrier()


def report(run: Run) -> None:
    """report.html; the run is finished without it, so a failure is told and no more."""
    run_dir = run.config.run.dir
    try:
        write_report(run_dir, run_dir / "report.html")
    except (OSError, ValueError) as error:
        log.exception("no report")
        run.console.note(f"no report: {error}; try tools/report.py {run_dir}")


def measure(run: Run, evaluator: Evaluator, text: str) -> PolicyOutput | None:
    """One evaluation of the present policy, the start policy as second scorer; on rank 0."""
    log.info(text)
    try:
        with run.timer("evaluate"):
            return evaluator.measure(
                run.learner.policy.ddp,
                run.start_policy,
                parallel.share,
                lambda ask: with_servers(run, ask, during=text),
            )
    except StepAbandoned:
        save_once(run)
        raise


def save(run: Run) -> None:
    """Checkpoint of the present state; an asynchronous one is complete once it is settled."""
    settle(run)
    with run.timer("checkpoint"):
        save_reference(run)
        run.pending = checkpoint.save(
            run.config.run.dir,
            policy=run.learner.policy,
            optimizer=run.learner.optimizer,
            scheduler=run.learner.scheduler,
            state=run.state,
            identity=run.identity,
            asynchronous=run.config.checkpoint.asynchronous,
        )
    if not run.config.checkpoint.asynchronous:
        settle(run)


def settle(run: Run, *, wait: bool = True) -> None:
    """Complete the checkpoint under way, if there is one, and remove old ones.

    Args: wait: until it is written; else it is completed if that has been done by now.
    """
    if run.pending is None:
        return
    with run.timer("checkpoint"):
        if not wait and parallel.maximum(float(run.pending.writing), run.platform):
            return
        run.pending, pending = None, run.pending
        pending.finish()
        if run.ranks.is_main:
            tidy(run.config)


def summary(run: Run, result: dict[str, Any], seconds: float) -> dict[str, Any]:
    """summary.json."""
    p = run.config.parallel
    return {
        "task": run.config.run.task,
        "steps": run.state.step,
        "seconds": seconds,
        "consumed_samples": run.state.consumed_samples,
        "policy_version": run.state.policy_version,
        "parallel": {
            "world_size": p.world_size,
            "tensor_model_parallel_size": p.tensor_model_parallel_size,
            "pipeline_model_parallel_size": p.pipeline_model_parallel_size,
            "data_parallel_size": p.data_parallel_size,
        },
        "eval": result,
    }
