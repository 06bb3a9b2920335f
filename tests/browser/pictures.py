"""Take the pictures of docs/images from the report of a run.

python tests/browser/pictures.py RUN_DIR [--output docs/images]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from devtools import browser

from megatron_sip.report import write_report

SIZES = {"laptop": (1440, 1560), "phone": (390, 1560)}


def take(run_dir: Path, output: Path) -> None:
    """Laptop and phone from the top; but laptop and dark: the pools, a word searched for."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        write_report(run_dir, file)
        with browser(Path(folder) / "profile") as page:
            for size, (width, height) in SIZES.items():
                for dark in (False, True):
                    page.look(width=width, height=height, dark=dark)
                    page.open(file)
                    if dark and size == "laptop":
                        page.write("#f-text", "peace")
                        page.click("#pool-list button")
                        page.evaluate(
                            "document.querySelector('#pools').scrollIntoView({behavior: 'instant'})"
                        )
                    page.picture(output / f"report-{size}-{'dark' if dark else 'light'}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    take(arguments.run_dir, arguments.output)
