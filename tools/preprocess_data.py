"""Turn text files into indexed datasets that the trainer (and Megatron) reads."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from megatron_sip.data.preprocess.processes import begin
from megatron_sip.data.splits import DEFAULT_SALT, parse_split

EXAMPLE = """example: data/corpus_train.*, _validation.* and _test.*, parted by a hash of the text
  python tools/preprocess_data.py --input 'corpus/*.jsonl.zst' --tokenizer tokenizer.json \\
      --output-prefix data/corpus --split train=80,validation=10,test=10

Input is .jsonl, .txt (one document a file), Parquet and Arrow (Hugging Face dataset folders);
.jsonl and .txt may be compressed (.gz, .zst, .bz2, .xz). It is named by files, folders, globs or
fsspec URLs (s3://, gs://, with their packages installed); the output is on a local disk.

Writes PREFIX.bin and PREFIX.idx as Megatron reads them, PREFIX.manifest.json (what it was made
of), PREFIX.documents.parquet (where each document came from) and PREFIX.eligible (documents of
at least --min-tokens). The bytes do not depend on --workers. On any error nothing is published
and older files stay; work that was done waits in PREFIX.partial for --resume.

A fast tokenizer (fastokens, gigatoken) is used where it is installed and gives the ids of the
exact one on a sample of the input; on one text in 1,024 it goes on being compared, and a difference
begins the run anew with the exact tokenizer and shows the text."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, globs or URLs")
    add("--tokenizer", type=Path, required=True, help="sentencepiece .model or tokenizer.json")
    add("--output-prefix", type=Path, required=True, metavar="PREFIX")
    add("--text-key", default="text", help="key of the text, dots go deeper (%(default)s)")
    add("--keep", nargs="+", default=[], metavar="KEY", help="keys to keep in the provenance (url)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    add("--resume", action="store_true", help="go on with a run that was killed")
    add("--split", metavar="NAME=SHARE,...", help="one dataset for each name")
    add("--split-salt", default=DEFAULT_SALT, help="mixed into the hash that splits (%(default)s)")
    add("--no-append-eod", action="store_true", help="no end-of-document id after each document")
    add("--min-tokens", type=int, default=256, help="shortest eligible document (%(default)s)")
    add("--max-bad-records", type=int, default=0, help="unusable records allowed (%(default)s)")
    add("--max-record-mb", type=int, default=16, help="longest record in MiB (%(default)s)")
    add("--exact", action="store_true", help="use no fast tokenizer")
    add("--follow-links", action="store_true", help="read links that lead out of their folder")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    begin(None if args.exact else args.tokenizer)
    from megatron_sip.data.preprocess.pipeline import Settings, preprocess  # while it starts

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if args.workers < 1 or args.min_tokens < 1 or args.max_record_mb < 1:
            raise ValueError("--workers, --min-tokens and --max-record-mb must be at least 1")
        settings = Settings(
            tokenizer=args.tokenizer,
            output_prefix=args.output_prefix,
            text_key=args.text_key,
            kept=tuple(args.keep),
            split=parse_split(args.split, salt=args.split_salt) if args.split is not None else None,
            append_eod=not args.no_append_eod,
            min_tokens=args.min_tokens,
            max_bad_records=args.max_bad_records,
            max_record_bytes=args.max_record_mb << 20,
            workers=args.workers,
            resume=args.resume,
            exact=args.exact,
            follow_links=args.follow_links,
        )
        manifests = preprocess(args.input, settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was published; go on with --resume", file=sys.stderr)
        return 130
    for name, manifest in manifests.items():
        prefix = f"{args.output_prefix}_{name}" if name else args.output_prefix
        print(f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
