"""Pretrain with Megatron-Core, and improve the policy with itself and its judges.

torchrun --nproc-per-node 2 pretrain_sip.py --config configs/quickstart.toml
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from megatron_sip import preflight
from megatron_sip.errors import RunFailed
from megatron_sip.lifetime import Stopped
from megatron_sip.recipe import load_config
from megatron_sip.supervision import restarts
from megatron_sip.supervision.heartbeat import HEART
from megatron_sip.supervision.monitor import PeerLost

PATIENCE_S = 10


def parse_arguments() -> argparse.Namespace:
    """The command line; combinations that contradict each other are refused here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe (configs/*.toml)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override one key of the recipe, e.g. --set optimizer.lr=1e-5 (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--pools", type=Path, default=None, metavar="DIR",
        help="learn from the recorded pools of another run (its pools/ folder) instead of servers",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with the run in run.dir from its latest checkpoint and its recorded pools",
    )  # fmt: skip
    parser.add_argument(
        "--explain", action="store_true",
        help="print what the run will do and cost, and start nothing; needs no torchrun",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="with --explain: print it as JSON")
    arguments = parser.parse_args()
    if arguments.json and not arguments.explain:
        parser.error("--json prints what --explain finds; add --explain")
    if sum(map(bool, (arguments.resume, arguments.explain, arguments.pools))) > 1:
        parser.error(
            "--resume goes on with a run and its own pools, --explain describes a new run, --pools "
            "replays another one; give one of them"
        )
    return arguments


def is_first_of_node() -> bool:
    """One rank of each node checks what all of them would find, and says it."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def main() -> int:
    arguments = parse_arguments()
    launch = restarts.launch_of()
    try:
        config = load_config(arguments.config, tuple(arguments.overrides))
        left = restarts.what_is_left(config.run.dir, launch)
        if left.finished or left.failure:
            return not_restarted(left)
        resume = arguments.resume or left.resumable
        if not arguments.explain and is_first_of_node():
            preflight.check(config, pools_dir=arguments.pools, resume=resume, begun=left.begun)
    except ValueError as error:
        if not is_first_of_node():
            time.sleep(PATIENCE_S)  # torchrun ends this rank when the first one has said why
        return failed(error)
    try:
        if arguments.explain:
            from megatron_sip.explain.text import print_explanation

            print_explanation(config, as_json=arguments.json)
            return 0
        from megatron_sip.train import train  # torch and Megatron-Core, once all of that is right

        train(config, launch, pools_dir=arguments.pools, resume=resume, begun=left.begun)
    except Stopped as stopped:
        restarts.note_failure(config.run.dir, launch, str(stopped))
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except (ValueError, RunFailed) as error:
        HEART.end(str(error))
        restarts.note_failure(config.run.dir, launch, str(error))
        return failed(error)
    except (OSError, PeerLost) as error:  # a restart may help
        HEART.end(f"{type(error).__name__}: {error}")
        return failed(error)
    return 0


def not_restarted(left: restarts.Left) -> int:
    """The run of this torchrun came to an end before; a restart of the ranks changes nothing."""
    if not left.finished and is_first_of_node():
        print(f"error: not restarted, it would fail again: {left.failure}", file=sys.stderr)
    return 0 if left.finished else 1


def failed(error: Exception) -> int:
    """Say why, in the run's log too if it is open; the exit status."""
    if logging.getLogger().handlers:
        logging.getLogger("megatron_sip").exception("the run failed")
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
