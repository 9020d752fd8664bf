"""Quantized matrices: the formats int8 and int4, their byte layout, and the reference of their product.

A row of a weight (out, in) is divided into groups of 32 inputs. A group stores its integers q and, in float16,

    int8   w = scale * q          q from -127 to 127                8.5 bits per weight
    int4   w = scale * q + min    q from 0 to 15                    5 bits per weight

The byte layout is the one that the kernels read, so a memory-mapped file is used in place. 64 rows form a panel (the
last panel is padded with zeros). A panel contains one block for each group, in the order of the groups:

    int8   64 scales, then for each pair of inputs (16 of them): row 0 even, odd; row 1 even, odd; ...   2176 bytes
    int4   64 scales, 64 mins, then for each pair 16 words of 32 bits (little-endian)                    1280 bytes
           word i contains the rows i, 16 + i, 32 + i and 48 + i: their even inputs in bits 0-3, 4-7, 8-11 and 12-15,
           their odd inputs 16 bits higher
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.core.errors import CheckpointError

GROUP = 32  # inputs that share a scale
PANEL = 64  # rows that are read together
PAIRS = GROUP // 2

BLOCK_BYTES = {"int8": 2 * PANEL + GROUP * PANEL, "int4": 4 * PANEL + GROUP * PANEL // 2}
LEVELS = {"int8": (-127, 127), "int4": (0, 15)}
FORMATS = tuple(BLOCK_BYTES)


def blocks_shape(format: str, rows: int, columns: int) -> tuple[int, int, int]:
    """(panels, groups, bytes of a block): the shape of the uint8 tensor that stores a (rows, columns) weight."""
    return -(-rows // PANEL), -(-columns // GROUP), BLOCK_BYTES[format]


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """One weight (rows, columns) in a quantized format; `data` is uint8 of `blocks_shape`.

    Raises CheckpointError if `data` has another dtype or shape.
    """

    format: str
    rows: int
    columns: int
    data: Tensor

    def __post_init__(self) -> None:
        expected = blocks_shape(self.format, self.rows, self.columns)
        if self.data.dtype != torch.uint8 or tuple(self.data.shape) != expected:
            raise CheckpointError(
                f"an {self.format} matrix of {self.rows} x {self.columns} is uint8 {expected}, not "
                f"{str(self.data.dtype).removeprefix('torch.')} {tuple(self.data.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight."""
        return self.rows, self.columns

    @property
    def nbytes(self) -> int:
        """Size of all blocks in bytes."""
        return self.data.numel()

    def groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (rows, columns) int8, scale and min (rows, groups) float32; min is zero for int8."""
        panels, count, _ = self.data.shape
        halves = self.data[..., : (4 if self.format == "int4" else 2) * PANEL].contiguous().view(torch.float16)
        per_row = halves.float().view(panels, count, -1, PANEL).permute(2, 0, 3, 1)  # (1 or 2, panels, 64, groups)
        per_row = per_row.reshape(-1, panels * PANEL, count)[:, : self.rows]
        scale = per_row[0]
        least = per_row[1] if self.format == "int4" else torch.zeros_like(scale)
        q = self._integers().reshape(panels * PANEL, count * GROUP)[: self.rows, : self.columns]
        return q, scale, least

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (rows, columns) that the integers represent."""
        q, scale, least = self.groups()
        wide = torch.nn.functional.pad(q, (0, -self.columns % GROUP)).float().view(self.rows, -1, GROUP)
        weight = (wide * scale[..., None] + least[..., None]).flatten(1)[:, : self.columns]
        return weight.to(dtype)

    def _integers(self) -> Tensor:
        """(panels, 64, groups, 32) int8."""
        panels, count, _ = self.data.shape
        if self.format == "int8":
            pairs = self.data[..., 2 * PANEL :].reshape(panels, count, PAIRS, PANEL, 2).view(torch.int8)
        else:
            words = self.data[..., 4 * PANEL :].reshape(panels, count, PAIRS, 16, 2, 2)  # (.., word, odd, byte)
            nibbles = torch.stack((words & 15, words >> 4), dim=-1).to(torch.int8)  # (.., word, odd, byte, nibble)
            pairs = nibbles.flatten(5).permute(0, 1, 2, 5, 3, 4).reshape(panels, count, PAIRS, PANEL, 2)
        return pairs.permute(0, 3, 1, 2, 4).reshape(panels, PANEL, count, GROUP)


def assemble(format: str, q: Tensor, scale: Tensor, least: Tensor | None = None) -> QuantizedMatrix:
    """The inverse of `groups`: q (rows, columns) of integers, scale and min (rows, groups) rounded to float16."""
    rows, columns = q.shape
    panels, count, _ = blocks_shape(format, rows, columns)
    wide = torch.nn.functional.pad(q.to(torch.int8), (0, count * GROUP - columns, 0, panels * PANEL - rows))
    pairs = wide.view(panels, PANEL, count, PAIRS, 2).permute(0, 2, 3, 1, 4)  # (panels, groups, 16, 64, 2)
    if format == "int8":
        packed = pairs.contiguous().view(torch.uint8).flatten(2)
        parts = [_halves(scale, panels), packed]
    else:
        assert least is not None
        nibbles = pairs.reshape(panels, count, PAIRS, 4, 16, 2).permute(0, 1, 2, 4, 5, 3).to(torch.uint8)
        words = nibbles[..., 0::2] | nibbles[..., 1::2] << 4  # (.., word, odd, byte)
        parts = [_halves(scale, panels), _halves(least, panels), words.flatten(2)]
    return QuantizedMatrix(format, rows, columns, torch.cat(parts, dim=-1).contiguous())


def _halves(values: Tensor, panels: int) -> Tensor:
    """(rows, groups) -> (panels, groups, 128) bytes of float16."""
    rows, count = values.shape
    wide = torch.nn.functional.pad(values.half(), (0, 0, 0, panels * PANEL - rows))
    return wide.view(panels, PANEL, count).transpose(1, 2).contiguous().view(torch.uint8)


def quantized_linear(x: Tensor, weight: QuantizedMatrix) -> Tensor:
    """x (..., columns) -> x W^T (..., rows) in float32: the reference of the fast products."""
    return x.float() @ weight.dequantize().T
