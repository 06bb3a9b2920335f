"""Train a sentencepiece tokenizer on text files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_sip.data.preprocess.bad_records import BadRecords
from megatron_sip.data.preprocess.documents import read_documents
from megatron_sip.data.preprocess.inputs import expand_inputs
from megatron_sip.data.splits import DEFAULT_SALT, parse_split, split_of
from megatron_sip.data.tokenizer_training import train_tokenizer

EXAMPLE = """example: 4096 pieces from the documents that preprocess_data.py puts into train
  python tools/train_tokenizer.py --input 'corpus/*.jsonl' --vocab-size 4096 \\
      --output tokenizer.model --split train=80,validation=10,test=10 --only train

Byte-fallback BPE that restores every text exactly. The same input gives the same file.
The text is held in memory while training runs: give a sample of a large corpus."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, globs or URLs")
    add("--vocab-size", type=int, required=True, help="pieces in all, 256 bytes included")
    add("--output", type=Path, required=True, help="the .model file; an older one is replaced")
    add("--text-key", default="text", help="key of the text in JSON, dots go deeper (%(default)s)")
    add("--split", metavar="NAME=SHARE,...", help="the split that preprocess_data.py gets")
    add("--only", metavar="NAME", help="train on this part of --split")
    add("--split-salt", default=DEFAULT_SALT, help="mixed into the hash that splits (%(default)s)")
    add("--max-bad-records", type=int, default=0, help="unusable records allowed (%(default)s)")
    add("--max-record-mb", type=int, default=16, help="longest record in MiB (%(default)s)")
    add("--follow-links", action="store_true", help="read links that lead out of their folder")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    try:
        if args.max_record_mb < 1:
            raise ValueError(f"--max-record-mb is {args.max_record_mb}, but must be at least 1")
        if (args.split is None) != (args.only is None):
            raise ValueError("--split and --only belong together; give both or neither")
        split = parse_split(args.split, salt=args.split_salt) if args.split is not None else None
        if split and args.only not in split.names:
            raise ValueError(f"--only {args.only!r} must be one of {', '.join(split.names)}")
        bad = BadRecords(limit=args.max_bad_records)
        documents = read_documents(
            expand_inputs(args.input, follow_links=args.follow_links),
            text_key=args.text_key,
            bad=bad,
            max_record_bytes=args.max_record_mb << 20,
        )
        texts = (t for t in documents if not split or split_of(t, split) == args.only)
        tokenizer = train_tokenizer(texts, vocab_size=args.vocab_size, output=args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.digest}")
    if bad.count:
        print(f"left out {bad.count} bad records:\n  " + "\n  ".join(bad.places), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
