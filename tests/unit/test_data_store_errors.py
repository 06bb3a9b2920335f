"""Wrong credentials, absent buckets and broken connections are errors with a name and a remedy."""

from __future__ import annotations

import errno
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from data_helpers import write_dataset
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from megatron_sip.data.preprocess.blocks import Cursor, read_blocks
from megatron_sip.data.preprocess.inputs import InputFile, expand_inputs
from megatron_sip.data.storage import RemoteBytes, expand_prefixes, file_system, local_part

TOOLS = Path(__file__).parents[2] / "tools"


def foreign(module: str, name: str, text: str) -> Exception:
    """An error as a library of a store raises it, which need not be installed."""
    return type(name, (Exception,), {"__module__": module})(text)


ACCESS, ABSENT, OTHER = "credentials", "check the bucket", "check the network"
ERRORS: dict[str, tuple[Exception, str]] = {
    "s3fs translated": (PermissionError("Access Denied"), ACCESS),
    "s3fs bucket": (FileNotFoundError("The specified bucket does not exist"), ABSENT),
    "s3fs other": (OSError(errno.EIO, "SlowDown"), OTHER),
    "botocore": (
        foreign("botocore.exceptions", "ClientError", "An error occurred (InvalidAccessKeyId)"),
        ACCESS,
    ),
    "botocore none": (
        foreign("botocore.exceptions", "NoCredentialsError", "Unable to locate credentials"),
        ACCESS,
    ),
    "botocore bucket": (
        foreign("botocore.errorfactory", "NoSuchBucket", "The specified bucket does not exist"),
        ABSENT,
    ),
    "gcsfs": (foreign("gcsfs.retry", "HttpError", "Anonymous caller: Forbidden, 403"), ACCESS),
    "google": (foreign("google.auth.exceptions", "RefreshError", "invalid_grant"), OTHER),
    "aiohttp": (foreign("aiohttp.client_exceptions", "ClientConnectorError", ""), OTHER),
    "time": (TimeoutError(), OTHER),
}


class FailingStore(MemoryFileSystem):
    """Fails where it is told to; else the memory file system."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012 (as the parent has it)
    pseudo_dirs = [""]  # noqa: RUF012
    failure: Exception | None = None
    failing: tuple[str, ...] = ()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("failing://", "memory://"))

    isfile = AbstractFileSystem.isfile  # which asks `info` and hides its errors
    isdir = AbstractFileSystem.isdir
    find = AbstractFileSystem.find

    def _fail(self, method: str) -> None:
        if self.failure is not None and method in self.failing:
            raise self.failure

    def info(self, path: str, **kwargs: Any) -> Any:
        self._fail("info")
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._fail("ls")
        return super().ls(path, detail=detail, **kwargs)

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._fail("open")
        stream = super().open(path, mode, **kwargs)
        if "read" not in self.failing:
            return stream
        store = self

        class Broken:
            def __getattr__(self, name: str) -> Any:
                return getattr(stream, name)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                stream.close()

            def read(self, size: int = -1) -> bytes:
                store._fail("read")
                return b""

        return Broken()

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self._fail("cat_file")
        return super().cat_file(path, **kwargs)


Breaks = Callable[..., None]


@pytest.fixture
def breaks() -> Iterator[Breaks]:
    """Makes the methods of failing:// raise an error."""
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    files = fsspec.filesystem("failing")
    files.pipe_file("/bucket/a.jsonl", b'{"text": "one"}\n')

    def set_failure(error: Exception, *methods: str) -> None:
        FailingStore.failure, FailingStore.failing = error, methods

    yield set_failure
    FailingStore.failure, FailingStore.failing = None, ()
    fsspec.filesystem("failing").store.clear()


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("pattern", ["a.jsonl", "*.jsonl", "", "none.jsonl"])
def test_a_store_that_refuses_to_be_listed_is_told(breaks: Breaks, case: str, pattern: str) -> None:
    error, remedy = ERRORS[case]
    breaks(error, "info", "ls")
    url = f"failing://bucket/{pattern}"
    with pytest.raises(ValueError) as found:
        expand_inputs([url])
    text = str(found.value)
    assert text.startswith("--input ") and url in text
    if isinstance(error, FileNotFoundError):
        assert "matches no file; check path and quotes: there is no such bucket or folder" in text
    else:
        assert "cannot be read" in text and remedy in text
        assert str(error) in text


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("method", ["open", "read"])
def test_a_store_that_fails_in_the_middle_is_not_taken_for_damage(
    breaks: Breaks, case: str, method: str
) -> None:
    files = expand_inputs(["failing://bucket/a.jsonl"])
    error, remedy = ERRORS[case]
    breaks(error, method)
    with pytest.raises(ValueError, match=r"failing:///bucket/a\.jsonl cannot be read") as found:
        list(read_blocks(files, columns=("text",), max_record_bytes=100, start=Cursor()))
    assert remedy in str(found.value) and "damaged" not in str(found.value)


def test_an_error_of_a_decoder_is_still_taken_for_damage(breaks: Breaks) -> None:
    breaks(OSError("zstd decompression failed"), "read")
    file = InputFile("failing://bucket/a.jsonl", 10, "jsonl", "")
    with pytest.raises(ValueError, match="damaged or truncated jsonl data"):
        list(read_blocks([file], columns=("text",), max_record_bytes=100, start=Cursor()))


@pytest.mark.parametrize("case", ERRORS)
def test_a_dataset_in_a_store_that_refuses_is_told(
    tmp_path: Path, breaks: Breaks, case: str
) -> None:
    write_dataset(tmp_path / "d", [[5, 1]])
    files = fsspec.filesystem("failing")
    for suffix in (".idx", ".bin", ".manifest.json"):
        files.pipe_file(f"/bucket/d{suffix}", (tmp_path / f"d{suffix}").read_bytes())
    error, remedy = ERRORS[case]
    calls: dict[str, Callable[[], object]] = {
        "failing://bucket/*": lambda: expand_prefixes("failing://bucket/*"),
        "failing://bucket/d.idx": lambda: local_part(
            "failing://bucket/d", ".idx", cache_dir=tmp_path / "cache"
        ),
        "failing://bucket/d.bin": lambda: RemoteBytes("failing://bucket/d.bin").read(0, 2),
        "failing://bucket/d.bin ": lambda: RemoteBytes("failing://bucket/d.bin").size,
    }
    for name, call in calls.items():
        call()
        if (tmp_path / "cache").exists():
            for path in (tmp_path / "cache").iterdir():
                path.unlink()
        breaks(error, "info", "ls", "cat_file")
        with pytest.raises(ValueError) as found:
            call()
        assert str(found.value).startswith(f"{name.strip()} cannot be read (")
        assert remedy in str(found.value)
        breaks(error)


def test_a_store_that_cannot_be_opened_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    error = foreign("google.auth.exceptions", "DefaultCredentialsError", "no credentials")

    def refuse(url: str) -> object:
        raise error

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(ValueError, match=r"^gs://b/x cannot be read \(DefaultCredentialsError: no"):
        file_system("gs://b/x")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^strange://b/x: Protocol not known: strange"):
        file_system("strange://b/x")


def test_our_own_mistakes_are_no_errors_of_a_store(breaks: Breaks) -> None:
    breaks(ZeroDivisionError("ours"), "ls", "info")
    with pytest.raises(ZeroDivisionError):
        expand_prefixes("failing://bucket/*")


@pytest.mark.parametrize("case", ["botocore", "gcsfs", "s3fs translated"])
def test_the_tools_end_with_an_error_and_not_with_a_traceback(
    tmp_path: Path, breaks: Breaks, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    breaks(ERRORS[case][0], "info", "ls")
    for name, *arguments in (
        ("preprocess_data.py", "--tokenizer", "t.model", "--output-prefix", tmp_path / "d"),
        ("train_tokenizer.py", "--vocab-size", 300, "--output", tmp_path / "t.model"),
    ):
        given = [name, "--input", "failing://bucket/*.jsonl", *arguments]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", [str(x) for x in given])
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        assert ended.value.code == 1
        err = capsys.readouterr().err
        assert err.startswith("error: --input failing://bucket/*.jsonl cannot be read (")
        assert ACCESS in err
