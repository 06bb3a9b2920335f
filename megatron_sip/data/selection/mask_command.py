"""`tools/dataset.py mask`: its options, which steps they ask for, what is printed.

Imports little, since the tool needs it for its other commands too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

MASK = """Choose documents: makes PREFIX.NAME, and PREFIX.NAME.report.json with what left and why.

example: no near duplicates, nothing of the evaluation files, and what a judge finds safe
  python tools/dataset.py mask data/corpus --name clean --tokenizer tokenizer.json \\
      --near-duplicates 0.8 --decontaminate benchmarks/gsm8k.jsonl --text-key question \\
      --judge configs/my.toml --criterion safety --min-score 0.5

Steps are applied in this order: --rules, --near-duplicates, --decontaminate, --judge. A recipe
names the mask in [[data.train]]. docs/data.md shows a file of rules."""

# Options of one step: (what they are without being given, the step).
_SETTINGS: dict[str, tuple[Any, str]] = {
    "seed": (0, "near_duplicates"),
    "text_key": ("text", "decontaminate"),
    "ngram_words": (13, "decontaminate"),
    "min_score": (0.0, "judge"),
    "max_score": (1.0, "judge"),
    "max_chars": (4000, "judge"),
    "logs": (Path("logs"), "judge"),
}


def add_mask_options(add: Any) -> None:
    """The options beside PREFIX. Args: add: `add_argument` of the command."""
    add("--name", required=True, help="of the mask")
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="of these datasets")
    add("--base", metavar="NAME", help="mask to start from (eligible)")
    add("--rules", type=Path, metavar="FILE.toml", help="bounds on the text")
    add("--near-duplicates", type=float, metavar="T", help="Jaccard similarity from which one goes")
    add("--seed", type=int, metavar="N", help=_help("seed", "of the signatures"))
    add("--decontaminate", nargs="+", type=Path, metavar="FILE", help="evaluation .jsonl or .txt")
    add("--text-key", help=_help("text_key", "key of their text"))
    add("--ngram-words", type=int, metavar="N", help=_help("ngram_words", "words in a row"))
    add("--judge", type=Path, metavar="RECIPE", help="recipe with judge, servers and cache")
    add("--criterion", metavar="NAME", help="a pointwise criterion of it")
    add("--min-score", type=float, metavar="S", help=_help("min_score"))
    add("--max-score", type=float, metavar="S", help=_help("max_score"))
    add("--max-chars", type=int, metavar="N", help=_help("max_chars", "of a text"))
    add("--logs", type=Path, metavar="DIR", help=_help("logs", "server logs"))


def mask_datasets(args: argparse.Namespace) -> None:
    """Make the mask of each dataset. Raises: ValueError for options that have no effect."""
    from megatron_sip.data.maintenance.progress import progress_line
    from megatron_sip.data.selection.combine import write_mask
    from megatron_sip.data.storage import expand_prefixes
    from megatron_sip.data.tokenizer import Tokenizer

    _settle(args)
    tokenizer = Tokenizer.load(args.tokenizer)
    with ExitStack() as stack:
        judge = _judge(args, stack)
        for prefix in (p for pattern in args.prefix for p in expand_prefixes(pattern)):
            with progress_line(f"mask {prefix}") as watch:
                report = write_mask(
                    prefix,
                    name=args.name,
                    base=args.base,
                    steps=_steps(args, judge),
                    tokenizer=tokenizer,
                    tokenizer_path=args.tokenizer,
                    progress=_watched(prefix, watch),
                )
            print(
                f"{prefix}.{args.name}: {report.selected:,} of {report.base_selected:,} documents"
            )
            for step in report.steps:
                rules = ", ".join(f"{rule} {count:,}" for rule, count in step.by_rule.items())
                print(f"  {step.name}: {step.left_out:,} left out of {step.seen:,} ({rules})")


def _help(name: str, text: str = "") -> str:
    return f"{text} ({_SETTINGS[name][0]})".strip()


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _settle(args: argparse.Namespace) -> None:
    """Fill in what was not given. Raises: ValueError for an option whose step was not asked for."""
    for name, (default, step) in _SETTINGS.items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, default)
        elif getattr(args, step) is None:
            raise ValueError(
                f"{_option(name)} {given} has no effect without {_option(step)}; give that too, "
                f"or leave {_option(name)} out"
            )
        elif name == "text_key" and all(path.suffix == ".txt" for path in args.decontaminate):
            raise ValueError(
                f"--text-key {given} has no effect: all files of --decontaminate are .txt, which "
                "are one text each; leave it out"
            )
    if (args.judge is None) != (args.criterion is None):
        raise ValueError("--judge and --criterion belong together; give both or neither")
    if all(step is None for step in (args.rules, args.near_duplicates, args.decontaminate)) and (
        args.judge is None
    ):
        raise ValueError("give one of --rules, --near-duplicates, --decontaminate and --judge")


def _watched(prefix: str, watch: Any) -> Any:
    """A mask's progress, which counts documents, for a line that counts bytes."""
    from megatron_sip.data.manifest import load_manifest
    from megatron_sip.data.storage import is_url

    if is_url(prefix):
        raise ValueError(f"{prefix}: masks are made of local datasets; make it where the data is")
    size = load_manifest(Path(f"{prefix}.manifest.json")).bin_bytes
    return lambda done, total: watch(done, size * done // total, size)


def _steps(args: argparse.Namespace, judge: Any) -> Sequence[Any]:
    """New steps for one dataset, in their order."""
    steps: list[Any] = []
    if args.rules is not None:
        from megatron_sip.data.selection.text_rules import TextRulesStep, load_rules

        steps.append(TextRulesStep(load_rules(args.rules)))
    if args.near_duplicates is not None:
        from megatron_sip.data.selection.near_duplicates import NearDuplicates

        steps.append(NearDuplicates(seed=args.seed, threshold=args.near_duplicates))
    if args.decontaminate is not None:
        from megatron_sip.data.selection.contamination import Contamination, read_evaluation

        files = [read_evaluation(path, text_key=args.text_key) for path in args.decontaminate]
        steps.append(Contamination(files, ngram_words=args.ngram_words))
    if judge is not None:
        from megatron_sip.data.selection.judge_step import JudgeStep

        steps.append(
            JudgeStep(
                judge[0],
                described=judge[1],
                minimum=args.min_score,
                maximum=args.max_score,
                max_chars=args.max_chars,
                max_missing_rate=judge[2],
            )
        )
    return steps


def _judge(args: argparse.Namespace, stack: ExitStack) -> Any:
    """(judge, what its scores depend on, max_missing_rate), None if none was asked for."""
    if args.judge is None:
        return None
    from megatron_sip.data.selection.judge_step import open_judge
    from megatron_sip.recipe import load_config

    config, say = load_config(args.judge), partial(print, file=sys.stderr)
    found = stack.enter_context(open_judge(config, args.criterion, log_dir=args.logs, say=say))
    assert config.judge is not None
    return *found, config.judge.max_missing_rate
