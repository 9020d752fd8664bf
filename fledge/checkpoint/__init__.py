"""L3: checkpoints in and out of files. One dict of official names and shapes in memory, whatever the file was.

Reads and writes the official `.pth`, Fledge's `.safetensors`, `.gguf` and two kinds of Hugging Face folder; tells
version and sizes from tensor names and shapes; builds the model; reads adapters and merges them. No training, no text,
no printing. Names load on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fledge.checkpoint.adapters.files import (
        Adapter,
        base_of,
        check_base,
        convert_adapter,
        inspect_adapter,
        read_adapter,
        read_adapters,
        save_adapter,
    )
    from fledge.checkpoint.adapters.merging import CombinedAdapter, MergeReport, combined, merge_file, merged
    from fledge.checkpoint.adapters.tuned_state import load_tuned_state, merge_tuned_state
    from fledge.checkpoint.conversion import ConversionReport, convert
    from fledge.checkpoint.detection import detect
    from fledge.checkpoint.identity import identity_of, short
    from fledge.checkpoint.info import CheckpointInfo, inspect
    from fledge.checkpoint.metadata import check_same_vocabulary
    from fledge.checkpoint.model_loader import LoadedModel, ModelWeights, assemble, load_model
    from fledge.checkpoint.reader import load, read, verify
    from fledge.checkpoint.record import Checkpoint
    from fledge.checkpoint.shapes import expected_shapes
    from fledge.checkpoint.tokenizers import load_tokenizer
    from fledge.checkpoint.writer import save

# No module may bear the name of a function here: importing the module would hide the function.
_HOME = {
    "Adapter": "adapters.files",
    "CombinedAdapter": "adapters.merging",
    "Checkpoint": "record",
    "CheckpointInfo": "info",
    "ConversionReport": "conversion",
    "LoadedModel": "model_loader",
    "MergeReport": "adapters.merging",
    "ModelWeights": "model_loader",
    "assemble": "model_loader",
    "base_of": "adapters.files",
    "check_base": "adapters.files",
    "check_same_vocabulary": "metadata",
    "combined": "adapters.merging",
    "convert": "conversion",
    "convert_adapter": "adapters.files",
    "detect": "detection",
    "expected_shapes": "shapes",
    "identity_of": "identity",
    "inspect": "info",
    "inspect_adapter": "adapters.files",
    "load": "reader",
    "load_model": "model_loader",
    "load_tokenizer": "tokenizers",
    "load_tuned_state": "adapters.tuned_state",
    "merge_file": "adapters.merging",
    "merge_tuned_state": "adapters.tuned_state",
    "merged": "adapters.merging",
    "read": "reader",
    "read_adapter": "adapters.files",
    "read_adapters": "adapters.files",
    "save": "writer",
    "save_adapter": "adapters.files",
    "short": "identity",
    "verify": "reader",
}

__all__ = [
    "Adapter",
    "Checkpoint",
    "CheckpointInfo",
    "CombinedAdapter",
    "ConversionReport",
    "LoadedModel",
    "MergeReport",
    "ModelWeights",
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
    "load_tokenizer",
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
