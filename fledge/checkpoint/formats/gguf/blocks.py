"""The types of ggml's tensors, between their bytes in a GGUF file and what Fledge holds.

    F32, F16, BF16, F64    plain numbers
    Q8_0                   32 numbers in 34 bytes:  scale (float16), 32 signed bytes      w = scale * q
    Q4_0                   32 numbers in 18 bytes:  scale, 16 bytes of nibbles            w = scale * (q - 8)
    Q4_1                   32 numbers in 20 bytes:  scale, min, 16 bytes of nibbles       w = scale * q + min

Byte j of the nibbles holds number j (low) and number 16 + j (high). These three lose nothing on the way into Fledge's
int8 and int4: of Q4_0, min = -8 * scale is a float16 too, unless it overflows. All other types, Q5_0, Q5_1 and the
K types above all, are unpacked by the `gguf` package.

Unpacked matrices become float16: its 11 bits are finer than the 4 to 8 bits the file had, where bfloat16's 8 bits are
not always, and float32 would double the memory for nothing. Where float16 overflows, the matrix becomes float32.
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
KEPT = {"int8": Q8_0, "int4": Q4_1}  # the type that holds a format of ours exactly
SIZES = {Q4_0: 18, Q4_1: 20, Q8_0: 34}  # bytes of 32 numbers
CHUNK = 1 << 22  # numbers unpacked at a time

Groups = tuple[Tensor, Tensor, Tensor]


def import_gguf() -> ModuleType:
    """The `gguf` package. Raises UnsupportedError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError('this needs the gguf package: pip install "fledge[gguf]"') from error
    return gguf


def get_block_size(kind: int) -> tuple[int, int]:
    """How many numbers a block of a type holds, and in how many bytes. Raises UnsupportedError for an unknown type."""
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
    """What ggml calls a type that `get_block_size` knows: "Q4_K"."""
    return NAMES[kind] if kind in NAMES else str(import_gguf().GGMLQuantizationType(kind).name)


def unpack_dense(raw: Tensor, kind: int, shape: tuple[int, ...], factor: float, dtype: torch.dtype) -> Tensor:
    """`factor` times the numbers in `raw` (bytes), as `dtype`, or as float32 where that overflows."""
    rows = raw.view(-1, shape[-1] // get_block_size(kind)[0] * get_block_size(kind)[1])
    step = max(1, CHUNK // shape[-1])
    for wanted in (dtype, torch.float32):
        dense = torch.empty(len(rows), shape[-1], dtype=wanted)
        for first in range(0, len(rows), step):
            wide = _float32(rows[first : first + step], kind) * factor
            part = dense[first : first + step]
            part.copy_(wide)
            if bool((part.isinf() & wide.isfinite()).any()):
                break
        else:
            break
    return dense.view(shape)


def unpack_quantized(raw: Tensor, kind: int, shape: tuple[int, ...], factor: float) -> QuantizedMatrix | None:
    """`factor` times the matrix in `raw` in Fledge's own format without any loss; None where there would be one."""
    form, columns = FORMATS[kind], shape[-1]
    blocks = raw.view(-1, columns // GROUP, SIZES[kind])
    rows = len(blocks)
    data = torch.empty(blocks_shape(form, rows, columns), dtype=torch.uint8)
    step = max(1, CHUNK // columns // PANEL) * PANEL
    for first in range(0, rows, step):
        q, scale, least = _groups(blocks[first : first + step], kind)
        scale, least = scale * factor, least * factor
        if int(q.min()) < LEVELS[form][0] or not bool((scale.half().isfinite() & least.half().isfinite()).all()):
            return None
        part = assemble(form, q.flatten(1), scale, least)
        data[first // PANEL : first // PANEL + len(part.data)] = part.data
    return QuantizedMatrix(form, rows, columns, data)


def _float32(rows: Tensor, kind: int) -> Tensor:
    if kind in SIZES:
        q, scale, least = _groups(rows.view(len(rows), -1, SIZES[kind]), kind)
        return (q.float() * scale[..., None] + least[..., None]).flatten(1)
    gguf = import_gguf()
    try:
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType(kind)))
    except NotImplementedError as error:
        raise UnsupportedError(f"the installed gguf package cannot unpack its type {get_type_name(kind)}") from error


def _groups(blocks: Tensor, kind: int) -> Groups:
    """q (rows, groups, 32) int8; scale and min (rows, groups) float32."""
    head = 4 if kind == Q4_1 else 2
    halves = blocks[..., :head].contiguous().view(torch.float16).float()
    scale = halves[..., 0]
    if kind == Q8_0:
        return blocks[..., head:].contiguous().view(torch.int8), scale, torch.zeros_like(scale)
    packed = blocks[..., head:]
    q = torch.cat((packed & 15, packed >> 4), dim=-1).view(torch.int8)
    return q, scale, halves[..., 1] if kind == Q4_1 else -8 * scale


def pack_quantized(matrix: QuantizedMatrix) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The bytes of a matrix whose rows are a multiple of 32 long, in the type that KEPT names: (rows, bytes)."""
    return torch.cat([_pack_groups(groups, KEPT[matrix.format]) for groups in _by_rows(matrix)]).numpy()


def _by_rows(matrix: QuantizedMatrix) -> Iterator[Groups]:
    """The groups of a matrix, some rows at a time: unpacking takes many times the memory of the matrix."""
    step = max(1, CHUNK // matrix.columns // PANEL)
    for first in range(0, len(matrix.data), step):
        rows = min(step * PANEL, matrix.rows - first * PANEL)
        yield QuantizedMatrix(matrix.format, rows, matrix.columns, matrix.data[first : first + step]).groups()


def _pack_groups(groups: Groups, kind: int) -> Tensor:
    q, scale, least = groups
    q = q.unflatten(1, (-1, GROUP))
    halves = [scale.half()] if kind == Q8_0 else [scale.half(), least.half()]
    head = torch.stack(halves, dim=-1).view(torch.uint8)
    if kind == Q8_0:
        return torch.cat((head, q.contiguous().view(torch.uint8)), dim=-1).flatten(1)
    nibbles = q.to(torch.uint8).unflatten(2, (2, GROUP // 2))
    return torch.cat((head, nibbles[:, :, 0] | nibbles[:, :, 1] << 4), dim=-1).flatten(1)
