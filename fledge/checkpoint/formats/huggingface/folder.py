"""Read Hugging Face folders: config.json and one or several files of tensors, in one of two layouts of names.

The layouts are that of the remote code for `rwkv5` and `rwkv6` and of transformers' `rwkv` (RWKV-4), and that of
flash-linear-attention for `rwkv6`. The remote code itself (modeling_rwkv5.py and similar files) and the tokenizer files
are not part of Fledge: copy them from the original repositories.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fledge.checkpoint import metadata
from fledge.checkpoint.formats.container import detect_container
from fledge.checkpoint.formats.pth import read_pth
from fledge.checkpoint.formats.safetensors import read_safetensors
from fledge.checkpoint.record import RawFile, StoredMetadata
from fledge.core.errors import CheckpointError, UnsupportedError

MAX_JSON_BYTES = 64 << 20
MODEL_TYPES = {"4": "rwkv", "5.2": "rwkv5", "6.0": "rwkv6"}
SINGLE = ("model.safetensors", "pytorch_model.bin")  # in order of preference
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PLAIN_NAME = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)  # a length that every file system supports


def read_folder(folder: Path, *, weights: bool = True) -> RawFile:
    """Read all tensors of a folder under the names of its layout, and its config.json as `settings`."""
    settings = _read_settings(folder)
    tensors: dict[str, Tensor] = {}
    stored = StoredMetadata()
    files = _find_weight_files(folder)
    for file in files:
        if detect_container(file) == "safetensors":
            part, texts = read_safetensors(file, weights=weights)
            stored = metadata.decode(texts, str(file)) if metadata.KEY in texts else stored
        else:
            part = read_pth(file, weights=weights)
        repeated = tensors.keys() & part.keys()
        if repeated:
            raise CheckpointError(f"{folder}: {min(repeated)!r:.80} is in two of its files; remove the stale one")
        tensors |= part
    return RawFile(folder, "folder", tensors, tuple(files), stored, settings)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        candidates = sorted(
            entry.name for entry in folder.iterdir() if entry.suffix in (".pth", ".safetensors") and entry.is_file()
        )
        advice = (
            f"give one of its files: {', '.join(candidates[:4])}"
            if candidates
            else "give a .pth, .safetensors or .gguf file"
        )
        raise CheckpointError(f"{folder} has no config.json, so it is not a Hugging Face model folder; {advice}")
    settings = _read_json(path)
    kind = settings.get("model_type")
    if kind == "rwkv7":
        raise UnsupportedError(f"{folder} is an RWKV-7 model, and RWKV-7 is not supported yet")
    if kind is not None and kind not in MODEL_TYPES.values():
        raise CheckpointError(
            f"{path}: model_type is {kind!r:.40}, which is not an RWKV model (looked for "
            f"{', '.join(MODEL_TYPES.values())})"
        )
    return settings


def _find_weight_files(folder: Path) -> list[Path]:
    """Return the files with tensors: one file, or those in an index."""
    for name, index in zip(SINGLE, INDEXES, strict=True):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            return _read_index(folder / index)
    raise CheckpointError(
        f"{folder} has a config.json but no weights: looked for {', '.join((*SINGLE, *INDEXES))}; "
        "download the whole folder"
    )


def _read_index(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; the file is damaged")
    for name in weight_map.values():
        # A file name, not a path: an index must not refer to files outside its folder.
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{index} names the file {name!r:.80}, which is not a plain file name; refused")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not in the folder; download it as well")
    return [index.parent / name for name in dict.fromkeys(weight_map.values())]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, too many for such a file; refused")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
