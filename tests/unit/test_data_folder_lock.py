"""A working folder is one process's alone, whoever works there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_sip.data import folder_lock
from megatron_sip.data.folder_lock import locked_folder
from megatron_sip.data.maintenance.output_folder import output_folder
from megatron_sip.data.preprocess.journal import working_folder

MESSAGE = r"d\.partial: another process is making this dataset; wait for it, or give .*--output"


def test_preprocessing_and_maintenance_exclude_each_other(tmp_path: Path) -> None:
    with (
        output_folder(tmp_path / "d"),
        pytest.raises(ValueError, match=MESSAGE),
        working_folder(tmp_path / "d", resume=False),
    ):
        pass
    with working_folder(tmp_path / "d", resume=False) as folder:
        (folder / "dataset.bin").write_text("half")
        for other in (output_folder(tmp_path / "d"), working_folder(tmp_path / "d", resume=True)):
            with pytest.raises(ValueError, match=MESSAGE), other:
                pass
        assert (folder / "dataset.bin").is_file()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_folder_that_was_removed_before_it_was_locked_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    open_folder = os.open

    def open_then_lose(path: Path, flags: int) -> int:
        found = open_folder(path, flags)
        monkeypatch.undo()
        shutil.rmtree(path)  # the other process has just ended
        if comes_back:
            path.mkdir()
        return found

    monkeypatch.setattr(folder_lock.os, "open", open_then_lose)
    with pytest.raises(ValueError, match=MESSAGE), working_folder(tmp_path / "d", resume=False):
        pass


def test_an_error_in_the_block_is_not_taken_for_a_lock_of_another(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="ours"), working_folder(tmp_path / "d", resume=False):
        raise BlockingIOError("ours")
    folder = tmp_path / "e"
    with (
        locked_folder(folder),
        pytest.raises(ValueError, match="another process"),
        locked_folder(folder),
    ):
        pass
    with locked_folder(tmp_path / "e"):  # was let go
        pass
