"""Pretrain with Megatron-Core, and improve the policy with itself and its judges.

torchrun --nproc-per-node 2 pretrain_sip.py --config configs/quickstart.toml
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from megatron_sip.errors import RunFailed
from megatron_sip.lifetime import Stopped, die_with_parent
from megatron_sip.recipe import load_config


def main() -> int:
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
    arguments = parser.parse_args()
    if arguments.resume and arguments.pools:
        parser.error("--resume goes on with its own pools; leave --pools out")
    try:
        config = load_config(arguments.config, tuple(arguments.overrides))
        from megatron_sip.train import train  # torch and Megatron-Core, once the recipe is right

        train(config, pools_dir=arguments.pools, resume=arguments.resume)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except (ValueError, RunFailed) as error:
        if logging.getLogger().handlers:  # the run directory's log is open
            logging.getLogger("megatron_sip").exception("the run failed")
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
if __name__ == "__mp_main__":  # a helper process, which saving a checkpoint starts
    die_with_parent()
