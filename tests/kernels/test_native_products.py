"""Products of the native library, compared with torch in float64 on every instruction set of this processor."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from closeness import assert_close_relative
from native_library import every_instruction_set, needs_native, use_instruction_set
from torch import Tensor

from fledge.kernels.native_ops import FORMATS, PackedMatrix, instruction_set, instruction_sets, matmul, pack
from fledge.kernels.quantized import quantized_linear
from fledge.kernels.rounding import quantize

pytestmark = needs_native

# (rows, columns) of weights: one entry, whole panels and groups, and sizes just below and above a whole panel.
SHAPES = [(1, 1), (64, 32), (131, 70), (63, 257), (65, 96)]
ROWS = (0, 1, 2, 3, 5, 6, 7, 13, 40)
# Largest error relative to the largest output. A quantized product rounds its inputs to 16 bits, 2e-5 of the largest
# value of a group. The other products differ only in the order of float32 sums. Their bound is terms * 2**-24 (see
# closeness.py): 1.9e-6 for the shortest sums here, of 32 terms. The largest errors measured are 3.7e-5 and 2.1e-7.
TOLERANCE = dict.fromkeys(FORMATS, 1.5e-6) | {"int8": 1e-4, "int4": 1e-4}


def make_weight(format: str, rows: int, columns: int) -> tuple[PackedMatrix, Tensor]:
    """A packed weight in this format, and the numbers that it represents in float64."""
    weight = torch.randn(rows, columns)
    if format in ("int8", "int4"):
        matrix, _ = quantize(weight, format)
        return PackedMatrix.from_quantized(matrix), matrix.dequantize(torch.float64)
    if format != "float32":
        weight = weight.half() if format == "float16 exact" else weight.bfloat16()
    return pack(weight, format), weight.double()


def make_inputs(rows: int, columns: int) -> Tensor:
    """Activations that include zeros, a long run of zeros and an outlier in each row."""
    x = torch.randn(rows, columns)
    x[:, ::3] = 0
    x[:, columns // 2 : columns // 2 + 40] = 0
    x[:, -1] = 50 * torch.randn(rows)
    return x


@every_instruction_set
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", list(FORMATS))
def test_products_equal_float64(instruction_set: str, format: str, shape: tuple[int, int]) -> None:
    matrix, dense = make_weight(format, *shape)
    with use_instruction_set(instruction_set):
        for rows in ROWS:
            x = make_inputs(rows, shape[1])
            rounded = x.bfloat16().double() if format == "bfloat16" else x.double()
            y, expected = matmul(x, matrix), rounded @ dense.T
            assert y.shape == expected.shape
            assert_close_relative(y, expected, TOLERANCE[format], f"{rows} rows")


@every_instruction_set
@pytest.mark.parametrize("format", list(FORMATS))
def test_a_row_has_the_same_bits_alone_and_in_any_batch(instruction_set: str, format: str) -> None:
    matrix, _ = make_weight(format, 131, 2100)  # more inputs than fit into the cache at once
    x = make_inputs(21, 2100)
    with use_instruction_set(instruction_set):
        expected = matmul(x, matrix)
        for rows in (1, 2, 5, 6, 7, 20):
            assert torch.equal(matmul(x[:rows], matrix), expected[:rows]), rows
        assert torch.equal(matmul(x[9:10], matrix), expected[9:10])


@every_instruction_set
@pytest.mark.parametrize("format", list(FORMATS))
def test_skipping_zeros_changes_no_bit(instruction_set: str, format: str) -> None:
    matrix, _ = make_weight(format, 131, 300)
    x = make_inputs(1, 300)
    with use_instruction_set(instruction_set):
        assert torch.equal(matmul(x, matrix, sparse=True), matmul(x, matrix))
        assert not matmul(torch.zeros(1, 300), matrix, sparse=True).any()


@every_instruction_set
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_inputs_give_non_finite_outputs(instruction_set: str, format: str, bad: float) -> None:
    matrix, _ = make_weight(format, 70, 64)
    x = torch.randn(3, 64)
    x[1, 5] = bad
    with use_instruction_set(instruction_set):
        y = matmul(x, matrix)
        sparse_x = torch.zeros(1, 64)
        sparse_x[0, 5] = bad
        sparse_y = matmul(sparse_x, matrix, sparse=True)
    assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2].isfinite().all()
    assert not sparse_y.isfinite().any()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
def test_the_tolerance_holds_for_small_and_large_inputs(format: str, scale: float) -> None:
    matrix, dense = make_weight(format, 70, 64)
    x = torch.randn(4, 64) * scale
    expected = x.double() @ dense.T
    assert_close_relative(matmul(x, matrix), expected, TOLERANCE[format])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_products_equal_the_reference(format: str) -> None:
    matrix, _ = quantize(torch.randn(67, 45), format)
    x = torch.randn(5, 45)
    assert_close_relative(
        matmul(x, PackedMatrix.from_quantized(matrix)), quantized_linear(x, matrix), TOLERANCE[format]
    )


def test_the_number_of_threads_changes_no_bit() -> None:
    matrix, _ = make_weight("int4", 500, 300)
    x = make_inputs(9, 300)
    expected = matmul(x, matrix)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        try:
            assert torch.equal(matmul(x, matrix), expected), count
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        *product(
            ("float32", "bfloat16", "bfloat16 exact"), (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        ),
        ("float16 exact", torch.float16),
    ],
    ids=str,
)
def test_a_weight_of_any_dtype_and_layout_is_packed_as_torch_rounds_it(
    format: str, dtype: torch.dtype, shape: tuple[int, int], transposed: bool
) -> None:
    rows, columns = shape
    weight = (100 * torch.randn(columns, rows)).to(dtype).T if transposed else (100 * torch.randn(shape)).to(dtype)
    expected = weight.bfloat16() if format.startswith("bfloat16") else weight
    packed = matmul(torch.eye(columns), pack(weight, format)).T
    torch.testing.assert_close(packed, expected.float(), rtol=0, atol=0)


def test_transposed_and_strided_weights_are_packed_correctly() -> None:
    weight, x = torch.randn(40, 70), torch.randn(3, 40)
    expected = x.double() @ weight.double()
    assert_close_relative(matmul(x, pack(weight.T, "float32")), expected, TOLERANCE["float32"])
    assert_close_relative(matmul(x, pack(weight.T[::2], "float32")), expected[:, ::2], TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_can_be_packed(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 33).to(dtype)
    weight[0, 0] = 6e-8  # subnormal in float16
    x = torch.eye(33)
    assert torch.equal(matmul(x, pack(weight, "float32")).T, weight.float())


def test_an_instruction_set_is_chosen_by_name() -> None:
    assert instruction_set() == instruction_sets()[0] and "portable" in instruction_sets()
    with use_instruction_set("portable"):
        assert instruction_set() == "portable"
    with pytest.raises(Exception, match="'mmx' is not one of"), use_instruction_set("mmx"):
        pass
