"""Reading distributed checkpoints without running what is in them.

torch's own reader unpickles the list of parts, and values that are no tensors, with whatever they name: a file made for
it runs any command. Here only the classes are known that such a list is made of, and values are read with weights_only.
Writing is torch's.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from fledge.core.errors import CheckpointError

LIST = ".metadata"
METADATA = "torch.distributed.checkpoint.metadata"
PARTS = (
    *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
    *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((METADATA, name) for name in PARTS),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in KNOWN:
            raise CheckpointError(f"its list of parts names {module}.{name}, which no list of parts needs")
        return super().find_class(module, name)


class PartsReader(FileSystemReader):
    """torch's reader of a folder of parts, with a list that cannot run anything."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The list of parts. Raises CheckpointError for one that is something else."""
        with open(self.folder / LIST, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError("its list of parts is something else")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PartsPlanner(DefaultLoadPlanner):
    """torch's planner; values that are no tensors are plain ones."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take one such value."""
        plain = torch.load(value, weights_only=True)
        held = io.BytesIO()
        torch.save(plain, held)  # torch's own method reads it again, now that it is known to be harmless
        held.seek(0)
        super().load_bytes(read_item, held)
