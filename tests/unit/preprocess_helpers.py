"""Inputs of every format, and preprocessing with or without worker processes, for tests."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard

from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.manifest import PARTS, Manifest
from megatron_sip.data.preprocess import pipeline, worker
from megatron_sip.data.tokenizer import Tokenizer

TEXTS = [
    *(f"Speech number {i} on the state of the union.\nThank you.\n" for i in range(40)),
    "carriage\r\nreturns\r\n",
    'quotes " and \\ and \u2028 and \x85 and \x1f',
    "a NUL \0 and an emoji \U0001f9d1\u200d\U0001f680, e\u0301, \ufeff",
    "   only its spaces   ",
    "long " * 5000,
]


def byte_level_bpe(path: Path, texts: Sequence[str] = TEXTS, *, normalizer: Any = None) -> Path:
    """A tokenizer.json with the special token <|endoftext|>."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(path))
    return path


begun: list[bool] = []  # of each pool that was started here: whether its workers are exact


class HerePool:
    """Does a worker's work at once in this process."""

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(task(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _pool_here(
    settings: pipeline.Settings, tokenizer: Tokenizer, *, exact: bool
) -> Iterator[HerePool]:
    work = worker.Work(
        tokenizer=settings.tokenizer,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        exact=exact,
        text_key=settings.text_key,
        kept=settings.kept,
        split=settings.split,
        append_eod=settings.append_eod,
        max_record_bytes=settings.max_record_bytes,
    )
    begun.append(exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_ENCODER", worker.BlockEncoder(work), raising=False)
        yield HerePool()


def preprocess_here(inputs: Sequence[Any], prefix: Path, **settings: Any) -> Manifest:
    """`preprocess` without worker processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_pool", _pool_here)
        return preprocess(inputs, prefix, **settings)


def preprocess(inputs: Sequence[Any], prefix: Path, **settings: Any) -> Manifest:
    settings = {"output_prefix": prefix, "exact": True} | settings
    return pipeline.preprocess([str(i) for i in inputs], pipeline.Settings(**settings))[""]


def part(prefix: Path, suffix: str) -> bytes:
    return Path(f"{prefix}{suffix}").read_bytes()


def parts(prefix: Path, suffixes: Sequence[str] = PARTS) -> dict[str, bytes]:
    return {suffix: part(prefix, suffix) for suffix in suffixes}


def documents(prefix: Path) -> list[dict[str, Any]]:
    return pq.read_table(f"{prefix}.documents.parquet").to_pylist()


def read_texts(prefix: Path, tokenizer: Path) -> list[str]:
    dataset, loaded = IndexedDataset(prefix), Tokenizer.load(tokenizer)
    return [loaded.decode(dataset.document(i)) for i in range(dataset.num_documents)]


def lines(texts: Sequence[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "n": 1}).encode() + b"\n" for text in texts)


def xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=0)


COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": xz}


def in_two(compress: Callable[[bytes], bytes], between: bytes = b"") -> Callable[[bytes], bytes]:
    """Two compressed streams one after another, cut inside a line."""
    return lambda data: compress(data[:1234]) + between + compress(data[1234:])


def jsonl(suffix: str, compress: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / f"a.jsonl{suffix}").write_bytes(compress(lines(TEXTS)))
        return str(folder / f"a.jsonl{suffix}")

    return write


def txt(suffix: str, compress: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        for i, text in enumerate(TEXTS):
            (folder / f"{i:04}.txt{suffix}").write_bytes(compress(text.encode()))
        return str(folder / f"*.txt{suffix}")

    return write


def parquet(column: Any = TEXTS, **options: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        table = pa.table({"id": list(range(len(column))), "text": column})
        pq.write_table(table, folder / "a.parquet", **({"row_group_size": 17} | options))
        return str(folder / "a.parquet")

    return write


def write_arrow(
    path: Path, table: pa.Table, *, new: Any = pa.ipc.new_stream, rows: int = 13, **options: Any
) -> None:
    with (
        pa.OSFile(str(path), "wb") as stream,
        new(stream, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer,
    ):
        writer.write_table(table, max_chunksize=rows)


def arrow(column: Any = TEXTS, **options: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        table = pa.table({"id": list(range(len(column))), "text": column})
        write_arrow(folder / "a.arrow", table, **options)
        return str(folder / "a.arrow")

    return write


def hugging_face(folder: Path, texts: Sequence[str] = TEXTS, **state: Any) -> str:
    """A dataset as `Dataset.save_to_disk` writes it, in two files."""
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    middle = len(texts) // 2
    for name, some in zip(names, (texts[:middle], texts[middle:]), strict=True):
        write_arrow(folder / name, pa.table({"text": list(some)}))
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"} | state
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
    return str(folder)


def in_memory(name: str, write: Callable[[Path], str]) -> Callable[[Path], str]:
    """A file in fsspec's memory:// file system."""

    def put(folder: Path) -> str:
        made = Path(write(folder))
        memory = fsspec.filesystem("memory")
        memory.pipe_file(f"/formats/{name}/{made.name}", made.read_bytes())
        return f"memory://formats/{name}/*"

    return put


def folder_of(write: Callable[[Path], str]) -> Callable[[Path], str]:
    """The folder instead of its files, with one of no known kind and a deeper one."""

    def put(folder: Path) -> str:
        (folder / "deep" / "deeper").mkdir(parents=True)
        write(folder / "deep" / "deeper")
        (folder / "README.md").write_text("no input")
        return str(folder)

    return put


DICTIONARY = pa.array(TEXTS).dictionary_encode()
FORMATS: dict[str, Callable[[Path], str]] = {
    **{f"jsonl{suffix}": jsonl(suffix, compress) for suffix, compress in COMPRESS.items()},
    **{f"jsonl{s} in two": jsonl(s, in_two(compress)) for s, compress in COMPRESS.items()},
    "jsonl.gz padded": jsonl(".gz", lambda data: in_two(gzip.compress)(data) + bytes(100)),
    "jsonl.xz padded": jsonl(".xz", in_two(xz, bytes(8))),
    "jsonl without last newline": jsonl("", lambda data: data.removesuffix(b"\n")),
    "txt": txt("", bytes),
    **{f"txt{suffix}": txt(suffix, compress) for suffix, compress in COMPRESS.items()},
    "parquet": parquet(),
    "parquet one group": parquet(row_group_size=1000, use_dictionary=False, compression="zstd"),
    "parquet of dictionaries": parquet(DICTIONARY),
    "parquet of large strings": parquet(pa.array(TEXTS, pa.large_string())),
    "parquet pages v2": parquet(data_page_version="2.0", data_page_size=100, compression="gzip"),
    "arrow stream": arrow(),
    "arrow file": arrow(new=pa.ipc.new_file),
    "arrow stream zstd": arrow(compression="zstd"),
    "arrow file lz4": arrow(new=pa.ipc.new_file, compression="lz4"),
    "arrow of dictionaries": arrow(DICTIONARY),
    "arrow file of dictionaries": arrow(DICTIONARY, new=pa.ipc.new_file, rows=1000),
    "arrow of large strings": arrow(pa.array(TEXTS, pa.large_string())),
    "hugging face": hugging_face,
    "memory jsonl.gz": in_memory("jsonl", jsonl(".gz", gzip.compress)),
    "memory parquet": in_memory("parquet", parquet()),
    "memory arrow": in_memory("arrow", arrow()),
    "folder of jsonl": folder_of(jsonl(".zst", zstandard.compress)),
    "folder of txt": folder_of(txt("", bytes)),
}


def assert_refused(inputs: Sequence[Any], folder: Path, match: str, **settings: Any) -> None:
    """A ValueError, nothing published, no working folder left."""
    with pytest.raises(ValueError, match=match):
        preprocess_here(inputs, folder / "out" / "d", **settings)
    assert not (folder / "out").exists() or list((folder / "out").iterdir()) == []
