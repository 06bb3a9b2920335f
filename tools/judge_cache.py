"""Work on the cache of verdicts and rewrites: report, merge, verify.

The cache is the folder that a recipe names as judge.cache_dir. Each command explains itself with an
example: python tools/judge_cache.py COMMAND --help
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

REPORT = """What the stored answers cost: by run, criterion, prompt and model.

example: tokens, waiting and money of one run; prices are of 10^6 prompt and completion tokens
  python tools/judge_cache.py report cache --run runs/mine --price Qwen/Qwen3-4B=0.10,0.40

Without --run all runs are shown; a line of "-" holds what was stored without its costs. Latency is
from the request to the reply, so its sum is longer than the wall time of parallel requests."""

MERGE = """Make one file of all whose process is dead.

example: after many runs, when a start takes long
  python tools/judge_cache.py merge cache

example: keep the newest 20 GiB; what is left out is paid for again when it is asked for again
  python tools/judge_cache.py merge cache --max-gib 20

Files of running processes stay, and so do those of other hosts, which cannot be seen from here. A
kill at any instant loses nothing. A damaged file becomes NAME.damaged; its good rows are merged."""

VERIFY = """Read every row and tell damaged ones by file.

example: after a disk gave errors
  python tools/judge_cache.py verify cache

Exit code 1 if any row or file is damaged. A run repairs what it can at its start, and asks again
for damaged answers only. Files of schema version 1 have no checksums."""


def report(args: argparse.Namespace) -> int:
    from megatron_sip.judge.costs import cost_report, text

    print(text(cost_report(args.folder, args.run, prices=dict(map(_price, args.price)))))
    return 0


def merge_files(args: argparse.Namespace) -> int:
    from megatron_sip.judge.cache_maintenance import merge

    most = None if args.max_gib is None else round(args.max_gib * 2**30)
    found = merge(args.folder, other_hosts=args.other_hosts, max_bytes=most)
    if found.merged is None:
        print(f"{args.folder}: nothing to merge")
    else:
        print(f"{found.merged}: {found.rows:,} rows of {found.files:,} files")
    for path in found.set_aside:
        print(f"{path}: damaged; set aside")
    for path in found.left:
        print(f"{path}: left, since it is in use or of another host")
    return 0


def verify_files(args: argparse.Namespace) -> int:
    from megatron_sip.judge.cache_maintenance import verify

    states = verify(args.folder)
    for state in states:
        what = "in use" if state.written else f"schema version {state.version or 'unknown'}"
        print(f"{state.path}: {state.rows:,} rows, {state.damaged_rows:,} damaged, {what}"
              + (f"; {state.problem}" if state.problem else ""))  # fmt: skip
    damaged = [state for state in states if not state.whole]
    print(f"{len(states):,} files, {sum(s.rows for s in states):,} rows, "
          f"{len(damaged):,} damaged files")  # fmt: skip
    return 1 if damaged else 0


def _price(argument: str) -> tuple[str, tuple[float, float]]:
    model, _, numbers = argument.rpartition("=")
    try:
        asked, answered = map(float, numbers.split(","))
    except ValueError:
        asked = answered = -1.0
    if not model or not (asked >= 0 and answered >= 0):
        raise ValueError(f"--price is {argument}; it must be MODEL=PROMPT,COMPLETION")
    return model, (asked, answered)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = _command(commands, "report", REPORT, report)
    add("--run", default="", metavar="RUN", help="the run that paid (all)")
    add("--price", action="append", default=[], metavar="MODEL=PROMPT,COMPLETION",
        help="price of 10^6 tokens, in any unit; may be repeated")  # fmt: skip
    add = _command(commands, "merge", MERGE, merge_files)
    add("--other-hosts", action="store_true", help="also files of other hosts; none may run")
    add("--max-gib", type=float, metavar="GIB", help="leave out what was stored first")
    _command(commands, "verify", VERIFY, verify_files)
    return parser.parse_args()


def _command(commands: Any, name: str, description: str, run: Any) -> Any:
    """A subcommand. Returns: its `add_argument`."""
    parser = commands.add_parser(
        name,
        help=description.partition("\n")[0],
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the recipe's judge.cache_dir")
    parser.set_defaults(call=run)
    return parser.add_argument


def main() -> int:
    args = arguments()
    try:
        return args.call(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
