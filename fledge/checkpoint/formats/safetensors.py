"""One `.safetensors` file: its header read with limits, its tensors mapped by the safetensors library, and written.

    8 bytes   N, little-endian
    N bytes   JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest  tensor bytes, without gaps; offsets count from here

The header is read by this file so that names and shapes of any model take milliseconds, and because a header may lie.
Writing is done here because it can then stream tensors that are larger than memory. Not here: what the names mean.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fledge.core.errors import CheckpointError, UnsupportedError
from fledge.core.files import atomic_path
from fledge.core.safetensors_header import HeaderError, SafetensorsHeader, encode_header, read_header

MAX_HEADER_BYTES = 32 << 20  # bytes; Finch 14B needs a quarter of a megabyte
LARGEST_RANK = 8
LARGEST_STRIDE = 1 << 56  # numbers; torch counts bytes in 64 bits
ALIGNMENT = 64  # bytes; the start of the data, so that mapped matrices suit vector loads
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = {**DTYPES, "U8": torch.uint8}  # bytes are quantized matrices; the header's record says which
CODES = {dtype: code for code, dtype in STORED.items()}


def read_safetensors(path: Path, *, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name -> tensor in file order, and the header's string map.

    With `weights` the tensors are views of the mapped file; without, they are on "meta" and only the header is read.
    Raises CheckpointError for a damaged file and UnsupportedError for tensors that are neither floats nor bytes.
    """
    header = _read_header(path)
    metadata = header.metadata or {}
    shapes = {name: _tensor(name, entry, path) for name, entry in header.entries.items()}
    _check_offsets(header.entries, header.data_bytes, path)
    if not weights:
        return shapes, metadata
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in shapes}, metadata
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write name -> tensor, whole or not at all, one tensor in memory at a time.

    The same tensors and metadata give the same bytes. Quantized matrices come first, whose sizes are multiples of whole
    cache lines, then wide dtypes before narrow ones: this keeps every tensor aligned.
    """
    ordered = sorted(tensors, key=lambda name: (tensors[name].dtype != torch.uint8, -tensors[name].element_size()))
    entries: dict[str, Any] = {}
    begin = 0
    for name in ordered:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(encode_header(entries, metadata, ALIGNMENT))
        for name in ordered:
            _write_bytes(tensors[name], file)


def _write_bytes(tensor: Tensor, file: BinaryIO) -> None:
    assert sys.byteorder == "little", "safetensors is little-endian"
    plain = tensor.detach().cpu().contiguous()
    file.write(plain.reshape(-1).view(torch.uint8).numpy().data)


def _read_header(path: Path) -> SafetensorsHeader:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            return read_header(file, size, MAX_HEADER_BYTES)
    except HeaderError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _tensor(name: str, entry: Any, path: Path) -> Tensor:
    """An entry as a tensor on "meta", or CheckpointError where it makes no sense."""
    where = f"{path}: header entry {name!r:.80}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets; the file is damaged")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in STORED:
        raise UnsupportedError(
            f"{where} has dtype {code!r:.20}; Fledge reads {', '.join(DTYPES)}: give the file from before quantization"
        )
    if not (_counts(shape) and _counts(offsets)) or len(shape) > LARGEST_RANK or len(offsets) != 2:
        raise CheckpointError(f"{where} has an impossible shape or place; the file is damaged")
    if offsets[1] - offsets[0] != math.prod(shape) * STORED[code].itemsize:
        raise CheckpointError(f"{where} has shape {shape} but {offsets[1] - offsets[0]} bytes; the file is damaged")
    if math.prod(max(size, 1) for size in shape) >= LARGEST_STRIDE:  # only with a 0 in it, which hides the rest
        raise CheckpointError(f"{where} has the impossible shape {shape}; the file is damaged")
    return torch.empty(shape, dtype=STORED[code], device="meta")


def _counts(values: Any) -> bool:
    """Whether this is a list of numbers from 0 to 2^62."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_offsets(entries: Mapping[str, Any], held: int, path: Path) -> None:
    """Raise CheckpointError unless the tensors fill the `held` bytes exactly, without gap or overlap."""
    end = 0
    for begin, stop in sorted(entry["data_offsets"] for entry in entries.values()):
        if begin != end:
            raise CheckpointError(f"{path} is damaged: its tensors overlap or leave gaps at byte {end}")
        end = stop
    if end != held:
        raise CheckpointError(
            f"{path} is truncated or damaged: its tensors need {end} bytes, {held} are there; download or copy it again"
        )
