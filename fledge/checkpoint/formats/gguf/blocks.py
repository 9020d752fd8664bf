"""Convert the tensor types of ggml from and to the bytes of a GGUF file.

    F32, F16, BF16, F64    plain numbers
    Q8_0                   32 numbers in 34 bytes:  scale (float16), 32 signed bytes      w = scale * q
    Q4_0                   32 numbers in 18 bytes:  scale, 16 bytes of nibbles            w = scale * (q - 8)
    Q4_1                   32 numbers in 20 bytes:  scale, min, 16 bytes of nibbles       w = scale * q + min

Byte j of the nibbles holds number j (low) and number 16 + j (high). These three convert to Fledge's int8 and int4
without loss: for Q4_0, min = -8 * scale is also a float16, unless it overflows. The `gguf` package unpacks all other
types, such as Q5_0, Q5_1 and the K types.

Unpacked matrices become float16. Its 11 bits are more precise than the 4 to 8 bits of the file; the 8 bits of bfloat16
are not always, and float32 would double the memory without a benefit. If float16 overflows, the matrix becomes float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fledge.core.errors import UnsupportedError
from fledge.kernels.quantized import GROUP, LEVELS, PANEL, QuantizedMatrix, assemble, blocks_shape

F32, F16, Q4_0, Q4_1, Q8_0, F64, BF16 = 0, 1, 2, 3, 8, 28, 30
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16, F64: torch.float64}
NAMES = {F32: "F32", F16: "F16", Q4_0: "Q4_0", Q4_1: "Q4_1", Q8_0: "Q8_0", F64: "F64", BF16: "BF16"}
FORMATS = {Q8_0: "int8", Q4_0: "int4", Q4_1: "int4"}
EXACT_TYPES = {"int8": Q8_0, "int4": Q4_1}  # the type that holds a format of Fledge exactly
SIZES = {Q4_0: 18, Q4_1: 20, Q8_0: 34}  # bytes of 32 numbers
CHUNK = 1 << 22  # numbers unpacked at a time

Groups = tuple[Tensor, Tensor, Tensor]


def import_gguf() -> ModuleType:
    """Import the `gguf` package. Raises UnsupportedError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError('this requires the gguf package: pip install "fledge[gguf]"') from error
    return gguf


def get_block_size(kind: int) -> tuple[int, int]:
    """Return the numbers and the bytes per block of a type. Raises UnsupportedError for an unknown type."""
    if kind in PLAIN:
        return 1, PLAIN[kind].itemsize
    if kind in SIZES:
        return GROUP, SIZES[kind]
    gguf = import_gguf()
    try:
        numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise UnsupportedError(f"its type {kind} is unknown to the installed gguf package") from error
    return numbers, size


def get_type_name(kind: int) -> str:
    """Return the name in ggml of a type that `get_block_size` accepts, such as "Q4_K"."""
    return NAMES[kind] if kind in NAMES else str(import_gguf().GGMLQuantizationType(kind).name)


def unpack_dense(raw: Tensor, kind: int, shape: tuple[int, ...], factor: float, dtype: torch.dtype) -> Tensor:
    """Return `factor` times the numbers in `raw` (bytes), as `dtype`, or as float32 if that overflows."""
    rows = raw.view(-1, shape[-1] // get_block_size(kind)[0] * get_block_size(kind)[1])
    step = max(1, CHUNK // shape[-1])
    for candidate in (dtype, torch.float32):
        dense = torch.empty(len(rows), shape[-1], dtype=candidate)
        for first in range(0, len(rows), step):
            wide = _to_float32(rows[first : first + step], kind) * factor
            part = dense[first : first + step]
            part.copy_(wide)
            if bool((part.isinf() & wide.isfinite()).any()):
                break
        else:
            break
    return dense.view(shape)


def unpack_quantized(raw: Tensor, kind: int, shape: tuple[int, ...], factor: float) -> QuantizedMatrix | None:
    """Return `factor` times the matrix in `raw` in the format of Fledge, or None if that would not be exact."""
    format, columns = FORMATS[kind], shape[-1]
    blocks = raw.view(-1, columns // GROUP, SIZES[kind])
    rows = len(blocks)
    data = torch.empty(blocks_shape(format, rows, columns), dtype=torch.uint8)
    step = max(1, CHUNK // columns // PANEL) * PANEL
    for first in range(0, rows, step):
        q, scale, minimum = _unpack_groups(blocks[first : first + step], kind)
        scale, minimum = scale * factor, minimum * factor
        if int(q.min()) < LEVELS[format][0] or not bool((scale.half().isfinite() & minimum.half().isfinite()).all()):
            return None
        part = assemble(format, q.flatten(1), scale, minimum)
        data[first // PANEL : first // PANEL + len(part.data)] = part.data
    return QuantizedMatrix(format, rows, columns, data)


def _to_float32(rows: Tensor, kind: int) -> Tensor:
    if kind in SIZES:
        q, scale, minimum = _unpack_groups(rows.view(len(rows), -1, SIZES[kind]), kind)
        return (q.float() * scale[..., None] + minimum[..., None]).flatten(1)
    gguf = import_gguf()
    try:
        with np.errstate(all="ignore"):  # the scale of a damaged file may be infinite
            return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType(kind)))
    except NotImplementedError as error:
        raise UnsupportedError(f"the installed gguf package cannot unpack its type {get_type_name(kind)}") from error


def _unpack_groups(blocks: Tensor, kind: int) -> Groups:
    """Return q (rows, groups, 32) int8, and scale and min (rows, groups) float32."""
    head = 4 if kind == Q4_1 else 2
    halves = blocks[..., :head].contiguous().view(torch.float16).float()
    scale = halves[..., 0]
    if kind == Q8_0:
        return blocks[..., head:].contiguous().view(torch.int8), scale, torch.zeros_like(scale)
    packed = blocks[..., head:]
    q = torch.cat((packed & 15, packed >> 4), dim=-1).view(torch.int8)
    return q, scale, halves[..., 1] if kind == Q4_1 else -8 * scale


def pack_quantized(matrix: QuantizedMatrix) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Pack a matrix, whose rows are a multiple of 32 long, in its type of EXACT_TYPES: (rows, bytes)."""
    return torch.cat([_pack_groups(groups, EXACT_TYPES[matrix.format]) for groups in _iter_groups(matrix)]).numpy()


def _iter_groups(matrix: QuantizedMatrix) -> Iterator[Groups]:
    """Yield the groups of some rows at a time, because unpacked groups take many times the memory of the matrix."""
    step = max(1, CHUNK // matrix.columns // PANEL)
    for first in range(0, len(matrix.data), step):
        rows = min(step * PANEL, matrix.rows - first * PANEL)
        yield QuantizedMatrix(matrix.format, rows, matrix.columns, matrix.data[first : first + step]).groups()


def _pack_groups(groups: Groups, kind: int) -> Tensor:
    q, scale, minimum = groups
    q = q.unflatten(1, (-1, GROUP))
    halves = [scale.half()] if kind == Q8_0 else [scale.half(), minimum.half()]
    head = torch.stack(halves, dim=-1).view(torch.uint8)
    if kind == Q8_0:
        return torch.cat((head, q.contiguous().view(torch.uint8)), dim=-1).flatten(1)
    nibbles = q.to(torch.uint8).unflatten(2, (2, GROUP // 2))
    return torch.cat((head, nibbles[:, :, 0] | nibbles[:, :, 1] << 4), dim=-1).flatten(1)
