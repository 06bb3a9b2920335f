"""Judge recorded pools again, with another judge, schedule or prompt, and say how far both agree.

The [judge] section of a recipe is asked about pools that a run recorded: its criteria, schedule and
servers (started, or reached where they run; the policy is not needed). Nothing is trained.

another judge: the recipe names another server in [judge]
  python tools/judge_pools.py --config configs/large_judge.toml --pools runs/quickstart \\
      --output runs/rejudged/large.parquet

the same judge with fewer questions: is a cheaper schedule as good?
  python tools/judge_pools.py --config runs/mine/config.toml --pools runs/mine --sample 200 \\
      --set 'judge.schedule={ name = "adaptive", budget = 0.3 }' --output adaptive.parquet

another prompt, on the steps 100 to 199 of two runs
  python tools/judge_pools.py --config configs/my.toml --pools runs/a runs/b --steps 100:200 \\
      --set 'judge.criteria=[{form="pairwise", name="q", server="judge", prompt="mine_v1.txt"}]' \\
      --output prompt.parquet

against people: pairs {"prefix": ..., "a": ..., "b": ..., "better": "a" | "b" | "tie"}, one a line
  python tools/judge_pools.py --config configs/my.toml --calibration labelled.jsonl \\
      --output people.parquet

Writes FILE.parquet (a row a candidate), FILE.json and FILE.png, and prints a table with 95 %
intervals and chance levels. They appear whole at the end, or not at all. Verdicts stand in the
recipe's judge.cache_dir as soon as they are given: the same command again pays for none twice, and
goes on after an interruption. docs/judges.md explains the measures.
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="recipe whose [judge] is asked")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override one key of the recipe (repeatable)")  # fmt: skip
    add("--pools", type=Path, nargs="+", default=[], metavar="PATH",
        help="folders of runs, or their pools/ folders")  # fmt: skip
    add("--steps", default=":", metavar="A:B",
        help="ledger steps from A up to, not including, B (all)")  # fmt: skip
    add("--sample", type=int, metavar="N", help="so many pools, drawn by run.seed (all)")
    add("--calibration", type=Path, metavar="FILE.jsonl", help="pairs that people have judged")
    add("--output", type=Path, required=True, metavar="FILE.parquet", help="what to write")
    add("--logs", type=Path, default=Path("logs"), metavar="DIR", help="server logs (%(default)s)")
    arguments = parser.parse_args()
    if not arguments.pools and arguments.calibration is None:
        parser.error("nothing to judge; give --pools, --calibration or both")
    if not arguments.pools and (arguments.sample is not None or arguments.steps != ":"):
        parser.error("--sample and --steps choose among --pools; give that too, or leave them out")
    return arguments


def judge(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_sip.judge.recorded_pools import parse_steps
    from megatron_sip.judge.rejudge import Task, rejudge
    from megatron_sip.judge.rejudge_view import (
        check_output,
        print_results,
        progress_line,
        publisher,
    )
    from megatron_sip.recipe import load_config

    check_output(arguments.output)
    config = load_config(arguments.config, tuple(arguments.overrides))
    steps = parse_steps(arguments.steps)
    task = Task(arguments.pools, steps, arguments.sample, arguments.calibration)
    with progress_line() as watch:
        results = rejudge(
            config,
            task,
            output=arguments.output,
            log_dir=arguments.logs,
            say=partial(print, file=sys.stderr),
            watch=watch,
            publish=publisher(config, task),
        )
    print_results(config, results, Console(markup=False, emoji=False, highlight=False))


def main() -> int:
    from megatron_sip.errors import RunFailed

    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception
    try:
        judge(arguments)
    except (ValueError, OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; verdicts that were given are in the cache", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
