"""Measure a part of megatron_sip against a named baseline, in one run on this machine.

Ratios are what counts; they hold on an otherwise idle machine. Each benchmark describes its
baseline in megatron_sip/benchmark/.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from megatron_sip.benchmark import BENCHMARKS


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(BENCHMARKS), help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    arguments = parser.parse_args()
    found = BENCHMARKS[arguments.name]()
    print(json.dumps(found) if arguments.json else readable(found))
    return 0


def readable(found: dict[str, Any]) -> str:
    """Settings, results and ratios, a line each."""
    lines = [found["name"]]
    for part in ("settings", "results", "ratios"):
        lines += ["", part, *(f"  {key}: {value}" for key, value in found[part].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
