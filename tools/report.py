"""Write a report of a run as one HTML file that loads nothing.

python tools/report.py runs/quickstart --compare runs/quickstart-ntp --output report.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN_DIR", help="runs to set beside"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="page to write")
    arguments = parser.parse_args()
    from megatron_sip.report import write_report

    try:
        write_report(arguments.run_dir, arguments.output, arguments.compare)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: written, {arguments.output.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
