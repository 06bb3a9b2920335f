"""Make all rewrites that a run will ask for before it begins."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

EXAMPLE = """examples:
  python tools/rewrite_corpus.py --config configs/quickstart.toml --output data/rewrites
  python tools/rewrite_corpus.py --config my.toml --data data/corpus_train --passes 1 \\
      --output data/rewrites --resume

Goes over the samples that the recipe's run draws (run.steps x data.global_batch_size of them, or
--samples N, or --passes N over the eligible documents), in its order, and asks the server of
[rewriter] for each. A server of kind "start" is started and ended; one of kind "connect" is used.

Every reply goes to judge.cache_dir, where the run finds it and pays for nothing, as long as data,
seed, cut (prefix and suffix tokens), prompt, model and sampling are the same. DIR gets
rewrites_NNNNNN.parquet, 1,024 samples each: sample, document, cut, suffix, reply, rewrite, its
policy tokens, and its outcome (kept, copied, failed, or why it is dropped: docs/rewriting.md).

A shard is there whole or not at all. After a kill, an interrupt or an error give --resume: whole
shards are skipped, replies in the cache are not asked for again, failed samples are. Another
recipe, prompt or model is refused. The exit status is 0 only if all is there and no more than
--max-failed of the samples have no reply."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="recipe with [rewriter]")
    add("--data", metavar="PREFIX", help="in place of data.train")
    add("--output", type=Path, required=True, metavar="DIR", help="for the shards")
    add("--resume", action="store_true", help="go on with what is in DIR")
    add("--passes", type=int, metavar="N", help="over the eligible documents")
    add("--samples", type=int, metavar="N", help="the first N samples of the run")
    add("--unsafe-mask", default="", metavar="NAME",
        help="documents in the mask PREFIX.NAME are unsafe: rewrites must differ")  # fmt: skip
    add("--max-failed", type=float, default=0.05, metavar="SHARE",
        help="samples that may be without a reply (%(default)s)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from megatron_sip.errors import RunFailed
    from megatron_sip.recipe import load_config

    overrides = [*args.set, *([f"data.train={json.dumps(args.data)}"] if args.data else [])]
    try:
        config = load_config(args.config, tuple(overrides))
        from megatron_sip.rewriting.corpus import Pass, rewrite_corpus  # slow to import

        settings = Pass(
            args.output, args.passes, args.samples, args.resume, args.unsafe_mask, args.max_failed
        )
        outcomes = rewrite_corpus(config, settings, say=partial(print, file=sys.stderr))
    except (ValueError, OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; whole shards stay; go on with --resume", file=sys.stderr)
        return 130
    total = outcomes.total()
    print(f"{args.output}: {total:,} samples")
    for name, count in outcomes.most_common():
        print(f"{count:>12,}  {count / total:6.1%}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
