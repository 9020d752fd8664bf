"""The bytes of a quantized matrix: every number at its documented position, padding, and wrong shapes."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_relative
from torch import Tensor

from fledge.core.errors import CheckpointError
from fledge.kernels.quantized import (
    BLOCK_BYTES,
    FORMATS,
    GROUP,
    LEVELS,
    PANEL,
    QuantizedMatrix,
    assemble,
    blocks_shape,
    quantized_linear,
)

# (rows, columns): one entry, whole panels and groups, sizes that are neither, and odd numbers of columns.
SHAPES = [(1, 1), (64, 32), (65, 33), (130, 97), (7, 160)]


def make_random_parts(format: str, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers q of all levels, and scales and minima that float16 represents exactly."""
    low, high = LEVELS[format]
    groups = -(-columns // GROUP)
    q = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    minimum = torch.randn(rows, groups).half().float() if format == "int4" else torch.zeros(rows, groups)
    return q, torch.rand(rows, groups).half().float(), minimum


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_groups_are_the_inverse_of_assemble(format: str, shape: tuple[int, int]) -> None:
    parts = make_random_parts(format, *shape)
    matrix = assemble(format, *parts)
    assert matrix.shape == shape and tuple(matrix.data.shape) == blocks_shape(format, *shape)
    assert matrix.nbytes == matrix.data.shape[0] * matrix.data.shape[1] * BLOCK_BYTES[format]
    for actual, expected in zip(matrix.groups(), parts, strict=True):
        assert torch.equal(actual, expected)
    q, scale, minimum = (part.double() for part in parts)
    expanded = [part.repeat_interleave(GROUP, dim=1)[:, : shape[1]] for part in (scale, minimum)]
    assert torch.equal(matrix.dequantize(torch.float64), (q * expanded[0] + expanded[1]).float().double())


@pytest.mark.parametrize("format", FORMATS)
def test_padding_of_a_block_is_zero(format: str) -> None:
    data = assemble(format, *make_random_parts(format, 65, 33)).data
    full = assemble(format, *(torch.ones_like(part) for part in make_random_parts(format, 128, 64))).data
    assert data.shape == full.shape
    widened = QuantizedMatrix(format, 128, 64, data)
    q, scale, minimum = widened.groups()
    assert not q[65:].any() and not q[:, 33:].any() and not scale[65:].any() and not minimum[65:].any()


def test_int8_bytes_have_the_documented_layout() -> None:
    q, scale, _ = make_random_parts("int8", 70, 40)
    data = assemble("int8", q, scale).data
    row, column = 67, 35  # panel 1, row 3 of it; group 1, odd input of pair 1
    block = data[1, 1]
    assert block[2 * 3 : 2 * 3 + 2].view(torch.float16).item() == scale[67, 1]
    assert block[2 * PANEL + (1 * PANEL + 3) * 2 + 1].view(torch.int8).item() == q[row, column]


def test_int4_bytes_have_the_documented_layout() -> None:
    q, scale, minimum = make_random_parts("int4", 70, 40)
    data = assemble("int4", q, scale, minimum).data
    for row, column in ((67, 35), (20, 6), (32, 7), (63, 39)):
        panel, group = row // PANEL, column // GROUP
        block, panel_row, pair = data[panel, group], row % PANEL, column % GROUP // 2
        assert block[2 * panel_row : 2 * panel_row + 2].view(torch.float16).item() == scale[row, group]
        offset = 2 * PANEL + 2 * panel_row
        assert block[offset : offset + 2].view(torch.float16).item() == minimum[row, group]
        word = block[4 * PANEL + (pair * 16 + panel_row % 16) * 4 :][:4]
        bits = int.from_bytes(bytes(word.tolist()), "little")
        assert bits >> (panel_row // 16 * 4 + column % 2 * 16) & 15 == q[row, column]


@pytest.mark.parametrize("format", FORMATS)
def test_the_reference_product_equals_float64(format: str) -> None:
    matrix = assemble(format, *make_random_parts(format, 65, 33))
    x = torch.randn(2, 3, 33)
    result = quantized_linear(x, matrix)
    assert result.shape == (2, 3, 65) and result.dtype == torch.float32
    # A float32 sum of 33 terms is exact to 33 * 2**-24 = 2e-6.
    assert_close_relative(result, x.double() @ matrix.dequantize(torch.float64).T, 1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 2, 1279, dtype=torch.uint8), r"is uint8 \(2, 2, 1280\), not uint8 \(2, 2, 1279\)"),
        (torch.zeros(1, 2, 1280, dtype=torch.uint8), r"not uint8 \(1, 2, 1280\)"),
        (torch.zeros(2, 2, 1280, dtype=torch.int8), r"not int8 \(2, 2, 1280\)"),
        (torch.zeros(5120, dtype=torch.uint8), r"not uint8 \(5120,\)"),
    ],
)
def test_data_of_a_wrong_shape_is_rejected(data: Tensor, message: str) -> None:
    assert QuantizedMatrix("int4", 70, 40, torch.zeros(2, 2, 1280, dtype=torch.uint8)).shape == (70, 40)
    with pytest.raises(CheckpointError, match=message):
        QuantizedMatrix("int4", 70, 40, data)
