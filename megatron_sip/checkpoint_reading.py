"""What Megatron-Core is about to unpickle, looked at first: metadata, common state, objects.

A manifest says that the files are those that were written, not that whoever wrote them meant well.
`mcore_patches.guard_unpickling` gives Megatron-Core `Reader` and `Planner` in place of its own.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_sip.unpickling import METADATA, sharded_object, unpickle, weights_only


class Reader(FileSystemReader):
    """Torch's reader of a checkpoint, with metadata of known classes alone; read once."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
            if self._metadata.storage_meta is None:
                self._metadata.storage_meta = StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class Planner(MCoreLoadPlanner):
    """Megatron-Core's plan of a load, with sharded objects of known classes alone."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        loaded = sharded_object(name, value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


def read_metadata(folder: Path) -> Metadata:
    """What stands where in a checkpoint.

    Raises: ValueError naming the file if it is damaged, names a foreign class, or points outside.
    """
    path = folder / ".metadata"
    try:
        found = unpickle(path.read_bytes(), METADATA)
        if not isinstance(found, Metadata):
            raise ValueError(f"it holds a {type(found).__name__}")
        for place in (found.storage_data or {}).values():
            file = folder / place.relative_path
            if file.parent != folder or place.offset < 0:
                raise ValueError(f"it points to {place.relative_path}")
            if place.offset + place.length > file.stat().st_size:
                raise ValueError(f"it points beyond the end of {place.relative_path}")
    except (OSError, ValueError, AttributeError) as error:
        raise _refusal(path, error) from None
    return found


def check_contents(folder: Path) -> None:
    """Look at everything of a checkpoint that is pickled; no tensor is read.

    Raises: ValueError naming the file that must not be loaded.
    """
    metadata = read_metadata(folder)
    common = folder / "common.pt"
    try:
        weights_only(common)
    except (OSError, ValueError) as error:
        raise _refusal(common, error) from None
    for index, place in (metadata.storage_data or {}).items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            continue
        path = folder / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        try:
            sharded_object(index.fqn, io.BytesIO(data))
        except ValueError as error:
            raise _refusal(path, f"{index.fqn}: {error}") from None


def _refusal(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{path} is not loaded: {why}; a checkpoint holds tensors and plain values alone. If you "
        "do not know where it comes from, remove it; a foreign model comes in as safetensors"
    )
