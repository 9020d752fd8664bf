"""L3: reads and writes checkpoints. In memory, a checkpoint is one dict of official names and shapes in every format.

    reader, writer, conversion   files to checkpoints, checkpoints to files, and one format to another
    formats                      `.pth`, `.safetensors`, `.gguf` and two layouts of Hugging Face folders
    detection, shapes            version and sizes from tensor names and shapes
    model_loader                 checkpoints to models that run
    quantization                 int8 and int4 matrices
    adapters                     LoRA adapters and tuned states, and merging them

This package does not train models, process text or print. Names load on first use, so that the import is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fledge.checkpoint.adapters.files import (
        Adapter,
        check_base,
        convert_adapter,
        describe_base,
        inspect_adapter,
        read_adapter,
        read_adapters,
        save_adapter,
    )
    from fledge.checkpoint.adapters.merging import (
        CombinedAdapter,
        MergeReport,
        combine_adapters,
        merge_adapters,
        merge_to_file,
    )
    from fledge.checkpoint.adapters.tuned_state import load_tuned_state, merge_tuned_state
    from fledge.checkpoint.conversion import ConversionReport, convert
    from fledge.checkpoint.detection import detect
    from fledge.checkpoint.identity import compute_identity, shorten_identity
    from fledge.checkpoint.info import CheckpointInfo, inspect
    from fledge.checkpoint.metadata import check_same_vocabulary
    from fledge.checkpoint.model_loader import LoadedModel, ModelWeights, assemble, load_model
    from fledge.checkpoint.reader import load, read, verify
    from fledge.checkpoint.record import Checkpoint
    from fledge.checkpoint.shapes import get_expected_shapes
    from fledge.checkpoint.tokenizers import load_tokenizer
    from fledge.checkpoint.writer import save

# No module may have the name of a function here: importing the module would hide the function.
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
    "describe_base": "adapters.files",
    "check_base": "adapters.files",
    "check_same_vocabulary": "metadata",
    "combine_adapters": "adapters.merging",
    "convert": "conversion",
    "convert_adapter": "adapters.files",
    "detect": "detection",
    "get_expected_shapes": "shapes",
    "compute_identity": "identity",
    "inspect": "info",
    "inspect_adapter": "adapters.files",
    "load": "reader",
    "load_model": "model_loader",
    "load_tokenizer": "tokenizers",
    "load_tuned_state": "adapters.tuned_state",
    "merge_to_file": "adapters.merging",
    "merge_tuned_state": "adapters.tuned_state",
    "merge_adapters": "adapters.merging",
    "read": "reader",
    "read_adapter": "adapters.files",
    "read_adapters": "adapters.files",
    "save": "writer",
    "save_adapter": "adapters.files",
    "shorten_identity": "identity",
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
    "check_base",
    "check_same_vocabulary",
    "combine_adapters",
    "compute_identity",
    "convert",
    "convert_adapter",
    "describe_base",
    "detect",
    "get_expected_shapes",
    "inspect",
    "inspect_adapter",
    "load",
    "load_model",
    "load_tokenizer",
    "load_tuned_state",
    "merge_adapters",
    "merge_to_file",
    "merge_tuned_state",
    "read",
    "read_adapter",
    "read_adapters",
    "save",
    "save_adapter",
    "shorten_identity",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
