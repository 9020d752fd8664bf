"""Read and write `.safetensors` files; the safetensors library maps their tensors.

The header is parsed here (fledge.core.safetensors_header), because a file may be hostile, and so that reading names and
shapes of any model takes milliseconds. Tensors are written here one by one, so that a model larger than memory can be
written.
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

MAX_HEADER_BYTES = 32 << 20  # Finch 14B needs a quarter of a megabyte
MAX_RANK = 8
MAX_STRIDE = 1 << 56  # numbers; torch counts bytes in 64 bits
ALIGNMENT = 64  # bytes; of the start of the data, so that vector loads of mapped matrices are aligned
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = {**DTYPES, "U8": torch.uint8}  # uint8 is for quantized matrices, which the record in the header lists
CODES = {dtype: code for code, dtype in STORED.items()}


def read_safetensors(path: Path, *, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return name -> tensor in the order of the file, and the string map of the header.

    With `weights` the tensors are views of the mapped file; without, they are on "meta" and only the header is read.
    Raises CheckpointError for a damaged file and UnsupportedError for tensors that are neither floats nor bytes.
    """
    header = _read_header(path)
    metadata = header.metadata or {}
    shapes = {name: _parse_entry(name, entry, path) for name, entry in header.entries.items()}
    _check_offsets(header.entries, header.data_bytes, path)
    if not weights:
        return shapes, metadata
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in shapes}, metadata
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write name -> tensor atomically, with one tensor in memory at a time.

    The same tensors and metadata give the same bytes. Quantized matrices come first, because their sizes are multiples
    of a cache line, then wide dtypes before narrow ones. Every tensor is therefore aligned.
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


def _parse_entry(name: str, entry: Any, path: Path) -> Tensor:
    """Return a tensor on "meta" for a header entry. Raises CheckpointError if the entry is invalid."""
    location = f"{path}: header entry {name!r:.80}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{location} lacks dtype, shape or data_offsets; the file is damaged")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in STORED:
        raise UnsupportedError(
            f"{location} has dtype {code!r:.20}; Fledge reads {', '.join(DTYPES)}: use the unquantized file"
        )
    if not (_is_counts(shape) and _is_counts(offsets)) or len(shape) > MAX_RANK or len(offsets) != 2:
        raise CheckpointError(f"{location} has an impossible shape or offsets; the file is damaged")
    if offsets[1] - offsets[0] != math.prod(shape) * STORED[code].itemsize:
        raise CheckpointError(f"{location} has shape {shape} but {offsets[1] - offsets[0]} bytes; the file is damaged")
    if math.prod(max(size, 1) for size in shape) >= MAX_STRIDE:  # only if it contains a 0, which hides the other sizes
        raise CheckpointError(f"{location} has the impossible shape {shape}; the file is damaged")
    return torch.empty(shape, dtype=STORED[code], device="meta")


def _is_counts(values: Any) -> bool:
    """Whether this is a list of integers from 0 to below 2^62."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_offsets(entries: Mapping[str, Any], data_bytes: int, path: Path) -> None:
    """Raise CheckpointError unless the tensors fill the data exactly, without gaps or overlaps."""
    end = 0
    for begin, stop in sorted(entry["data_offsets"] for entry in entries.values()):
        if begin != end:
            raise CheckpointError(f"{path} is damaged: its tensors overlap or leave gaps at byte {end}")
        end = stop
    if end != data_bytes:
        raise CheckpointError(
            f"{path} is truncated or damaged: its tensors need {end} bytes, {data_bytes} are present; download or "
            "copy it again"
        )
