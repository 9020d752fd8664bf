"""Read distributed checkpoints without executing code from them.

torch's own reader unpickles the metadata file, and values that are not tensors, without restrictions, so a malicious
file can run any command. The reader of this module accepts only the classes that such metadata consists of, and it
reads values with `weights_only`. Checkpoints are written with torch's own functions.
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

METADATA_FILE = ".metadata"
METADATA_MODULE = "torch.distributed.checkpoint.metadata"
METADATA_CLASSES = (
    *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
    *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((METADATA_MODULE, name) for name in METADATA_CLASSES),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in ALLOWED:
            raise CheckpointError(f"its {METADATA_FILE} refers to {module}.{name}, which is not allowed")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with a restricted unpickler for the metadata."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the metadata. Raises CheckpointError if the file contains anything else."""
        with open(self.folder / METADATA_FILE, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"its {METADATA_FILE} does not contain the metadata of a checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's planner, which accepts only plain values besides tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one value that is not a tensor."""
        plain_value = torch.load(value, weights_only=True)
        checked = io.BytesIO()
        torch.save(plain_value, checked)  # torch's own method unpickles this copy, which is safe
        checked.seek(0)
        super().load_bytes(read_item, checked)
