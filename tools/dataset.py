"""Work on indexed datasets: inspect, verify, merge, split, adopt, mask, when, where.

A dataset is named by its PREFIX, the path of PREFIX.bin without `.bin`. Each command explains
itself with an example: python tools/dataset.py COMMAND --help
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

INSPECT = """Show what a dataset holds: documents, tokens, lengths, sources, samples.

example: three documents as text, and a picture of the lengths
  python tools/dataset.py inspect data/corpus_train --tokenizer tokenizer.model --plot lengths.png

Only the small parts are read, so this is quick for any size. Lengths count the end-of-document id.
With --json the same facts are one JSON object on standard output."""

VERIFY = """Read datasets whole and name the first broken document of the first broken file.

example: nothing was damaged on the way to another machine
  python tools/dataset.py verify 'data/corpus_*' --tokenizer tokenizer.model

Digests of .idx and .bin, each document against PREFIX.documents.parquet, each mask PREFIX.*. With
--tokenizer, that the ids are that tokenizer's. Exit code 1 if anything is wrong."""

MERGE = """Join datasets of one tokenizer, in the order given.

example: two crawls as one; shorter documents than 256 tokens are not eligible
  python tools/dataset.py merge data/crawl-1 data/crawl-2 --output data/crawl --min-tokens 256

PREFIX.bin and PREFIX.idx are byte for byte those of one build of all documents. The inputs stay."""

SPLIT = """Part a dataset by a hash of each document's tokens.

example: data/corpus_train.* and data/corpus_validation.*
  python tools/dataset.py split data/corpus --output-prefix data/corpus \\
      --split train=99,validation=1

A document goes to the same part wherever it stands, so that exact duplicates stay together. The
hash is of the tokens; tools/preprocess_data.py --split hashes the text and parts otherwise."""

ADOPT = """Give an existing Megatron .bin/.idx a manifest, provenance and eligible documents.

example: what Megatron-LM's preprocess_data.py made as --output-prefix data/old
  python tools/dataset.py adopt data/old --tokenizer tokenizer.json --min-tokens 256

Reads data/old.idx, or data/old_text_document.idx. Both files stay as they are; every id, length
and pointer in them is checked. The tokenizer must be the one that the data was made with."""


MASK = """Choose documents: makes PREFIX.NAME, and PREFIX.NAME.report.json with what left and why.

example: no near duplicates, nothing of the evaluation files, and what a judge finds safe
  python tools/dataset.py mask data/corpus --name clean --tokenizer tokenizer.json \\
      --near-duplicates 0.8 --decontaminate benchmarks/gsm8k.jsonl --text-key question \\
      --judge configs/my.toml --criterion safety --min-score 0.5

Steps are applied in this order: --rules, --near-duplicates, --decontaminate, --judge. A recipe
names the mask in [[data.train]]. docs/data.md shows a file of rules."""

WHEN = """The documents that a step of a run learns from.

example: what the thousandth step saw
  python tools/dataset.py when --config configs/my.toml --step 1000

Steps count from 1, as in metrics.jsonl; step 1 is pools/step_00000000."""

WHERE = """The steps of a run at which a document comes.

example: all uses of document 12345 of data/corpus_train
  python tools/dataset.py where data/corpus_train 12345 --config configs/my.toml"""


def inspect_dataset(args: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_sip.data.maintenance.inspect import inspect
    from megatron_sip.data.maintenance.inspect_view import plot, print_facts, to_json

    tokenizer = _tokenizer(args.tokenizer)
    samples = args.samples if args.samples is not None else 3 if tokenizer else 0
    facts = inspect(
        args.prefix, tokenizer, num_samples=samples, seed=args.seed, cache_dir=args.cache_dir
    )
    if args.plot is not None:
        plot(facts, args.plot)
    if args.json:
        print(to_json(facts))
    else:
        print_facts(facts, Console(markup=False, emoji=False, highlight=False))


def verify_datasets(args: argparse.Namespace) -> None:
    from megatron_sip.data.maintenance.progress import progress_line
    from megatron_sip.data.maintenance.verify import verify

    tokenizer = _tokenizer(args.tokenizer)
    for prefix in _expanded(args.prefix):
        with progress_line("verify") as watch:
            found = verify(prefix, tokenizer, watch=watch)
        masks = f", masks {', '.join(found.masks)}" if found.masks else ""
        print(
            f"{prefix}: whole, {found.documents:,} documents, {found.tokens:,} tokens, "
            f"{found.eligible:,} eligible{masks}"
            + ("" if found.tokenizer_checked else "; not checked against a tokenizer")
        )


def merge_datasets(args: argparse.Namespace) -> None:
    from megatron_sip.data.maintenance.merge import merge
    from megatron_sip.data.maintenance.progress import progress_line

    with progress_line("merge") as watch:
        prefixes = _expanded(args.prefix)
        manifest = merge(prefixes, args.output, min_tokens=args.min_tokens, watch=watch)
    _tell(args.output, manifest)


def split_dataset(args: argparse.Namespace) -> None:
    from megatron_sip.data.maintenance.progress import progress_line
    from megatron_sip.data.maintenance.split import split
    from megatron_sip.data.splits import DEFAULT_SALT, parse_split

    shares = parse_split(args.split, salt=DEFAULT_SALT if args.salt is None else args.salt)
    with progress_line("split") as watch:
        manifests = split(args.prefix, args.output_prefix, shares, watch=watch)
    for name, manifest in manifests.items():
        _tell(f"{args.output_prefix}_{name}", manifest)


def adopt_dataset(args: argparse.Namespace) -> None:
    from megatron_sip.data.maintenance.adopt import adopt, find_prefix
    from megatron_sip.data.maintenance.progress import progress_line
    from megatron_sip.data.tokenizer import Tokenizer

    with progress_line("adopt") as watch:
        manifest = adopt(
            args.prefix,
            Tokenizer.load(args.tokenizer),
            min_tokens=args.min_tokens,
            vocab_size=args.vocab_size,
            watch=watch,
        )
    _tell(find_prefix(args.prefix), manifest)


def mask_datasets(args: argparse.Namespace) -> None:
    from contextlib import ExitStack

    from megatron_sip.data.maintenance.progress import progress_line
    from megatron_sip.data.selection.combine import write_mask
    from megatron_sip.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    with ExitStack() as stack:
        judge = _judge(args, stack)
        for prefix in _expanded(args.prefix):
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


def _watched(prefix: str, watch: Any) -> Any:
    """A mask's progress, which counts documents, for a line that counts bytes."""
    from megatron_sip.data.manifest import load_manifest
    from megatron_sip.data.storage import is_url

    if is_url(prefix):
        raise ValueError(f"{prefix}: masks are made of local datasets; make it where the data is")
    size = load_manifest(Path(f"{prefix}.manifest.json")).bin_bytes
    return lambda done, total: watch(done, size * done // total, size)


def _steps(args: argparse.Namespace, judge: Any) -> list[Any]:
    """New steps for one dataset, in their order. Raises: ValueError if none was asked for."""
    steps: list[Any] = []
    if args.rules is not None:
        from megatron_sip.data.selection.text_rules import TextRulesStep, load_rules

        steps.append(TextRulesStep(load_rules(args.rules)))
    if args.near_duplicates is not None:
        from megatron_sip.data.selection.near_duplicates import NearDuplicates

        steps.append(NearDuplicates(seed=args.seed, threshold=args.near_duplicates))
    if args.decontaminate:
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
    if not steps:
        raise ValueError("give one of --rules, --near-duplicates, --decontaminate and --judge")
    return steps


def _judge(args: argparse.Namespace, stack: Any) -> Any:
    """(judge, what its scores depend on, max_missing_rate), None if none was asked for."""
    if (args.judge is None) != (args.criterion is None):
        raise ValueError("--judge and --criterion belong together; give both or neither")
    if args.judge is None:
        return None
    from megatron_sip.data.selection.judge_step import open_judge
    from megatron_sip.recipe import load_config

    def on_wait(name: str, seconds: float) -> None:
        print(
            f"waiting for server {name}: {seconds:.0f} s, log {args.logs / name}.log",
            file=sys.stderr,
        )

    config = load_config(args.judge)
    found = stack.enter_context(
        open_judge(config, args.criterion, log_dir=args.logs, on_wait=on_wait)
    )
    assert config.judge is not None
    return *found, config.judge.max_missing_rate


def show_step(args: argparse.Namespace) -> None:
    from megatron_sip.data.positions import when
    from megatron_sip.recipe import load_config

    _print_uses(when(load_config(args.config, tuple(args.set)), args.step))


def show_document(args: argparse.Namespace) -> None:
    from megatron_sip.data.positions import where
    from megatron_sip.recipe import load_config

    _print_uses(where(load_config(args.config, tuple(args.set)), args.prefix, args.document))


def _print_uses(uses: Any) -> None:
    print("step\tposition\tdataset\tdocument\tcut\tsource")
    for use in uses:
        print(use.step, use.position, use.prefix, use.document, use.cut, use.source, sep="\t")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = _command(commands, "inspect", INSPECT, inspect_dataset)
    add("prefix", metavar="PREFIX", help="dataset, a path or a URL")
    add("--tokenizer", type=Path, metavar="FILE", help="shows documents as text")
    add("--samples", type=int, metavar="N", help="documents to show (3 with --tokenizer)")
    add("--seed", type=int, default=0, metavar="N", help="chooses them (%(default)s)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the lengths")
    add("--json", action="store_true", help="facts as JSON")
    add("--cache-dir", type=Path, metavar="DIR", help="for the small parts of a URL's dataset")

    add = _command(commands, "verify", VERIFY, verify_datasets)
    add("prefix", nargs="+", metavar="PREFIX", help="datasets; quoted patterns with * too")
    add("--tokenizer", type=Path, metavar="FILE", help="of these datasets")

    add = _command(commands, "merge", MERGE, merge_datasets)
    add("prefix", nargs="+", metavar="PREFIX", help="datasets; quoted patterns with * too")
    add("--output", type=Path, required=True, metavar="PREFIX", help="the new dataset")
    add("--min-tokens", type=int, metavar="N", help="of eligible documents (that of the inputs)")

    add = _command(commands, "split", SPLIT, split_dataset)
    add("prefix", metavar="PREFIX", help="dataset")
    add("--output-prefix", type=Path, required=True, metavar="PREFIX", help="PREFIX_NAME are made")
    add("--split", required=True, metavar="NAME=SHARE,...", help="whole shares of their sum")
    add("--salt", metavar="TEXT", help="another salt gives another split")

    add = _command(commands, "adopt", ADOPT, adopt_dataset)
    add("prefix", metavar="PREFIX", help="PREFIX.idx or PREFIX_text_document.idx must exist")
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="that made the ids")
    add("--min-tokens", type=int, required=True, metavar="N", help="of eligible documents")
    add("--vocab-size", type=int, metavar="N", help="ids are below it (the tokenizer's)")

    _add_mask(commands)
    _add_positions(commands)
    return parser.parse_args()


def _add_mask(commands: Any) -> None:
    add = _command(commands, "mask", MASK, mask_datasets)
    add("prefix", nargs="+", metavar="PREFIX", help="datasets; quoted patterns with * too")
    add("--name", required=True, help="of the mask")
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="of these datasets")
    add("--base", metavar="NAME", help="mask to start from (eligible)")
    add("--rules", type=Path, metavar="FILE.toml", help="bounds on the text")
    add("--near-duplicates", type=float, metavar="T", help="Jaccard similarity from which one goes")
    add("--seed", type=int, default=0, metavar="N", help="of the signatures (%(default)s)")
    add("--decontaminate", nargs="+", type=Path, metavar="FILE", help="evaluation .jsonl or .txt")
    add("--text-key", default="text", help="key of their text (%(default)s)")
    add("--ngram-words", type=int, default=13, metavar="N", help="words in a row (%(default)s)")
    add("--judge", type=Path, metavar="RECIPE", help="recipe with judge, servers and cache")
    add("--criterion", metavar="NAME", help="a pointwise criterion of it")
    add("--min-score", type=float, default=0.0, metavar="S", help="(%(default)s)")
    add("--max-score", type=float, default=1.0, metavar="S", help="(%(default)s)")
    add("--max-chars", type=int, default=4000, metavar="N", help="of a text (%(default)s)")
    add("--logs", type=Path, default=Path("logs"), metavar="DIR", help="server logs (%(default)s)")


def _add_positions(commands: Any) -> None:
    for name, text, run in (("when", WHEN, show_step), ("where", WHERE, show_document)):
        add = _command(commands, name, text, run)
        if name == "where":
            add("prefix", metavar="PREFIX", help="dataset, as the recipe names it")
            add("document", type=int, metavar="NUMBER", help="of the document in it")
        else:
            add("--step", type=int, required=True, metavar="N", help="from 1")
        add("--config", type=Path, required=True, metavar="RECIPE")
        add("--set", action="append", default=[], metavar="KEY=VALUE", help="override of a key")


def main() -> int:
    from megatron_sip.errors import RunFailed

    args = arguments()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a document may hold any character
    try:
        args.run(args)
    except (ValueError, OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _command(commands: Any, name: str, text: str, run: Any) -> Any:
    """A subcommand. Returns: its `add_argument`."""
    summary = text.partition("\n")[0]
    parser = commands.add_parser(
        name,
        help=summary,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser.add_argument


def _tokenizer(path: Path | None) -> Any:
    from megatron_sip.data.tokenizer import Tokenizer

    return None if path is None else Tokenizer.load(path)


def _expanded(patterns: list[str]) -> list[str]:
    from megatron_sip.data.storage import expand_prefixes

    return [prefix for pattern in patterns for prefix in expand_prefixes(pattern)]


def _tell(prefix: Path | str, manifest: Any) -> None:
    ends = "each ends" if manifest.append_eod else "none ends"
    print(
        f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.dtype}, {ends} with eod {manifest.eod}"
    )


if __name__ == "__main__":
    sys.exit(main())
