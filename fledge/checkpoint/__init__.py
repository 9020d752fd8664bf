"""L3: checkpoints in and out of files. One dict of official names and shapes in memory, whatever the file was.

Reads and writes the official `.pth`, Fledge's `.safetensors`, `.gguf` and two kinds of Hugging Face folder; tells
version and sizes from tensor names and shapes; builds the model; reads adapters and merges them. No training, no text,
no printing. Names load on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fledge.checkpoint.adapters import (
        Adapter,
        base_of,
        check_base,
        convert_adapter,
        inspect_adapter,
        read_adapter,
        read_adapters,
        save_adapter,
    )
    from fledge.checkpoint.assembly import LoadedModel, Weights, assemble, load_model
    from fledge.checkpoint.conversion import Conversion, convert
    from fledge.checkpoint.detection import detect
    from fledge.checkpoint.identity import identity_of, short
    from fledge.checkpoint.info import CheckpointInfo, inspect
    from fledge.checkpoint.merging import Changes, Merged, combined, merge_file, merged
    from fledge.checkpoint.metadata import check_same_vocabulary
    from fledge.checkpoint.reader import load, read, verify
    from fledge.checkpoint.record import Checkpoint
    from fledge.checkpoint.shapes import expected_shapes
    from fledge.checkpoint.tuned import load_tuned_state, merge_tuned_state
    from fledge.checkpoint.writer import save

# No module may bear the name of a function here: importing the module would hide the function.
_HOME = {
    "Adapter": "adapters",
    "Changes": "merging",
    "Checkpoint": "record",
    "CheckpointInfo": "info",
    "Conversion": "conversion",
    "LoadedModel": "assembly",
    "Merged": "merging",
    "Weights": "assembly",
    "assemble": "assembly",
    "base_of": "adapters",
    "check_base": "adapters",
    "check_same_vocabulary": "metadata",
    "combined": "merging",
    "convert": "conversion",
    "convert_adapter": "adapters",
    "detect": "detection",
    "expected_shapes": "shapes",
    "identity_of": "identity",
    "inspect": "info",
    "inspect_adapter": "adapters",
    "load": "reader",
    "load_model": "assembly",
    "load_tuned_state": "tuned",
    "merge_file": "merging",
    "merge_tuned_state": "tuned",
    "merged": "merging",
    "read": "reader",
    "read_adapter": "adapters",
    "read_adapters": "adapters",
    "save": "writer",
    "save_adapter": "adapters",
    "short": "identity",
    "verify": "reader",
}

__all__ = [
    "Adapter",
    "Changes",
    "Checkpoint",
    "CheckpointInfo",
    "Conversion",
    "LoadedModel",
    "Merged",
    "Weights",
    "assemble",
    "base_of",
    "check_base",
    "check_same_vocabulary",
    "combined",
    "convert",
    "convert_adapter",
    "detect",
    "expected_shapes",
    "identity_of",
    "inspect",
    "inspect_adapter",
    "load",
    "load_model",
    "load_tuned_state",
    "merge_file",
    "merge_tuned_state",
    "merged",
    "read",
    "read_adapter",
    "read_adapters",
    "save",
    "save_adapter",
    "short",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
