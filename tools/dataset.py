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

from megatron_sip.data.positions_command import (
    WHEN,
    WHERE,
    add_when_options,
    add_where_options,
    show_document,
    show_step,
)
from megatron_sip.data.selection.mask_command import MASK, add_mask_options, mask_datasets

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


def inspect_dataset(args: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_sip.data.maintenance.inspect import inspect
    from megatron_sip.data.maintenance.inspect_view import plot, print_facts, to_json

    tokenizer = _tokenizer(args.tokenizer)
    samples = args.samples if args.samples is not None else 3 if tokenizer else 0
    if args.seed is not None and not samples:
        raise ValueError(
            f"--seed {args.seed} has no effect without samples; give --tokenizer, or leave it out"
        )
    seed = args.seed or 0
    facts = inspect(
        args.prefix, tokenizer, num_samples=samples, seed=seed, cache_dir=args.cache_dir
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = _command(commands, "inspect", INSPECT, inspect_dataset)
    add("prefix", metavar="PREFIX", help="dataset, a path or a URL")
    add("--tokenizer", type=Path, metavar="FILE", help="shows documents as text")
    add("--samples", type=int, metavar="N", help="documents to show (3 with --tokenizer)")
    add("--seed", type=int, metavar="N", help="chooses them (0)")
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

    add = _command(commands, "mask", MASK, mask_datasets)
    add("prefix", nargs="+", metavar="PREFIX", help="datasets; quoted patterns with * too")
    add_mask_options(add)

    add_when_options(_command(commands, "when", WHEN, show_step))
    add_where_options(_command(commands, "where", WHERE, show_document))
    return parser.parse_args()


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
