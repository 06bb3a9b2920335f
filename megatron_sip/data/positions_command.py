"""`tools/dataset.py when` and `where`: their options and what they print.

Imports little, since the tool needs it for its other commands too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sip.data.positions import Use

WHEN = """The documents that a step of a run learns from.

example: what the thousandth step saw
  python tools/dataset.py when --config configs/my.toml --step 1000

Steps count from 1, as in metrics.jsonl; step 1 is pools/step_00000000."""

WHERE = """The steps of a run at which a document comes.

example: all uses of document 12345 of data/corpus_train
  python tools/dataset.py where data/corpus_train 12345 --config configs/my.toml"""


def add_when_options(add: Any) -> None:
    """Args: add: `add_argument` of the command."""
    add("--step", type=int, required=True, metavar="N", help="from 1")
    _add_recipe(add)


def add_where_options(add: Any) -> None:
    """Args: add: `add_argument` of the command."""
    add("prefix", metavar="PREFIX", help="dataset, as the recipe names it")
    add("document", type=int, metavar="NUMBER", help="of the document in it")
    _add_recipe(add)


def _add_recipe(add: Any) -> None:
    add("--config", type=Path, required=True, metavar="RECIPE")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override of a key")


def show_step(args: argparse.Namespace) -> None:
    """Print the documents of a step."""
    from megatron_sip.data.positions import when
    from megatron_sip.recipe import load_config

    _print_uses(when(load_config(args.config, tuple(args.set)), args.step))


def show_document(args: argparse.Namespace) -> None:
    """Print the steps of a document."""
    from megatron_sip.data.positions import where
    from megatron_sip.recipe import load_config

    _print_uses(where(load_config(args.config, tuple(args.set)), args.prefix, args.document))


def _print_uses(uses: Iterable[Use]) -> None:
    print("step\tposition\tdataset\tdocument\tcut\tsource")
    for use in uses:
        print(use.step, use.position, use.prefix, use.document, use.cut, use.source, sep="\t")
