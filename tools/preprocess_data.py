"""Turn text files into indexed datasets that the trainer (and Megatron) reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_sip.data.preprocess import preprocess
from megatron_sip.data.splits import DEFAULT_SALT, parse_split

EXAMPLE = """example: data/corpus_train.*, _validation.* and _test.*, parted by a hash of the text
  python tools/preprocess_data.py --input 'corpus/*.jsonl' --tokenizer tokenizer.model \\
      --output-prefix data/corpus --split train=80,validation=10,test=10

Writes PREFIX.bin, PREFIX.idx and PREFIX.manifest.json; without --split one dataset, PREFIX.*.
Input is .jsonl (one object a line) or .txt (one document a file). On any error nothing is
published and older files stay; on success older files of the same names are replaced."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help=".jsonl or .txt files")
    add("--tokenizer", type=Path, required=True, help="sentencepiece .model file")
    add("--output-prefix", type=Path, required=True, metavar="PREFIX")
    add("--text-key", default="text", help="key of the text in JSON, dots go deeper (%(default)s)")
    add("--split", metavar="NAME=SHARE,...", help="one dataset for each name")
    add("--split-salt", default=DEFAULT_SALT, help="mixed into the hash that splits (%(default)s)")
    add("--no-append-eod", action="store_true", help="no end-of-document id after each document")
    add("--max-bad-records", type=int, default=0, help="unusable records allowed (%(default)s)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    try:
        manifests = preprocess(
            args.input,
            tokenizer=args.tokenizer,
            output_prefix=args.output_prefix,
            text_key=args.text_key,
            split=parse_split(args.split, salt=args.split_salt) if args.split is not None else None,
            append_eod=not args.no_append_eod,
            max_bad_records=args.max_bad_records,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, manifest in manifests.items():
        prefix = f"{args.output_prefix}_{name}" if name else args.output_prefix
        print(f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
