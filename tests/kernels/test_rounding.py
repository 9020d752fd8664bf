"""Quantization of weights: the native fit equals the torch reference, and its errors are small."""

from __future__ import annotations

import pytest
import torch
from closeness import UNIT_ROUNDOFF
from torch import Tensor

from fledge.core.errors import CheckpointError
from fledge.kernels.native_ops import quantize_native
from fledge.kernels.quantized import FORMATS, GROUP, QuantizedMatrix
from fledge.kernels.rounding import quantize, quantize_reference
from fledge.native.library import why_missing

needs_native = pytest.mark.skipif(why_missing() is not None, reason=f"needs the native library: {why_missing()}")


def _random() -> Tensor:
    return torch.randn(70, 75)


def _outliers() -> Tensor:
    weight = torch.randn(70, 75)
    weight[::5, 7] *= 40
    return weight


def _constant() -> Tensor:
    return torch.full((65, 40), 0.37)


def _one_sided() -> Tensor:
    return torch.rand(65, 64) + 3


WEIGHTS = {
    "random": _random,
    "outliers": _outliers,
    "constant": _constant,
    "one-sided": _one_sided,
    "zero": lambda: torch.zeros(65, 40),
    "one number": lambda: torch.tensor([[-2.5]]),
    "tiny": lambda: torch.randn(64, 64) * 1e-6,  # scales are subnormal in float16
    "vanishing": lambda: torch.randn(64, 64) * 1e-12,  # scales are zero in float16
    "huge": lambda: torch.randn(64, 64) * 1e4,
    "half": lambda: torch.randn(66, 70).half(),
    "bfloat16": lambda: torch.randn(66, 70).bfloat16(),
    "transposed": lambda: torch.randn(75, 70).T,
}


def compute_squared_error(weight: Tensor, matrix: QuantizedMatrix, importance: Tensor | None = None) -> float:
    difference = (weight.double() - matrix.dequantize(torch.float64)).square()
    return float((difference if importance is None else difference * importance.double()).sum())


@needs_native
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("format", FORMATS)
def test_the_native_fit_equals_the_reference(format: str, name: str, weighted: bool) -> None:
    weight = WEIGHTS[name]()
    importance = torch.rand(weight.shape[1]) ** 4 if weighted else None
    native, reference = quantize_native(weight, format, importance), quantize_reference(weight, format, importance)
    assert native is not None and reference is not None
    if format == "int8":
        assert torch.equal(native[0].data, reference[0].data)
    tolerance = 1e-4 * reference[1] + 1e-12 * float(weight.float().square().sum())
    assert abs(native[1] - reference[1]) <= tolerance
    if weighted or weight.shape[1] % GROUP == 0:  # otherwise the error includes the padding of the last group
        assert abs(compute_squared_error(weight, native[0], importance) - reference[1]) <= 10 * tolerance


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("format", FORMATS)
def test_numbers_out_of_range_are_rejected(format: str, value: float) -> None:
    weight = torch.randn(70, 75)
    weight[69, 74] = value
    assert quantize_reference(weight, format) is None
    with pytest.raises(CheckpointError, match=rf"a weight of \(70, 75\) has numbers that {format} cannot represent"):
        quantize(weight, format)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_int8_errors_are_at_most_half_a_step(name: str) -> None:
    weight = WEIGHTS[name]().float()
    matrix, error = quantize(weight, "int8")
    _, scale, _ = matrix.groups()
    step = scale.repeat_interleave(GROUP, dim=1)[:, : weight.shape[1]]
    difference = (weight - matrix.dequantize()).abs()
    # The scale is rounded to float16, by 1/2048 or 3e-8, so the largest number may be slightly above 127 steps.
    float32_error = UNIT_ROUNDOFF[torch.float32] * weight.abs()
    assert bool((difference <= 0.5 * step + 127 * (step / 2048 + 3e-8) + float32_error).all())
    # A sum of float32 squares. No absolute tolerance: the error of the tiny weights is 1e-13 and less.
    assert error == pytest.approx(compute_squared_error(weight, matrix), rel=1e-3, abs=0)


def test_int4_is_no_worse_than_plain_rounding_and_better_with_outliers() -> None:
    for name, gain in (("random", 0.97), ("outliers", 0.999)):
        weight = WEIGHTS[name]()
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).view(70, -1, GROUP)
        low, high = padded.amin(-1, keepdim=True), padded.amax(-1, keepdim=True)
        step = (high - low) / 15
        plain = ((padded - low) / step).round() * step + low
        assert quantize(weight, "int4")[1] < gain * float((plain - padded).square().sum())


def test_constant_groups_are_exact_in_int4() -> None:
    matrix, error = quantize(torch.full((3, 64), 0.375), "int4")
    assert error == 0 and torch.equal(matrix.dequantize(), torch.full((3, 64), 0.375))


@pytest.mark.parametrize("fit", [quantize_reference, quantize], ids=["torch", "chosen"])
def test_importance_moves_the_error_to_less_important_inputs(fit: object) -> None:
    weight, importance = torch.randn(64, 96), torch.ones(96)
    importance[::4] = 100
    assert callable(fit)
    (plain, _), (weighted, error) = fit(weight, "int4"), fit(weight, "int4", importance)
    assert error == pytest.approx(compute_squared_error(weight, weighted, importance), rel=1e-4)
    assert error < 0.8 * compute_squared_error(weight, plain, importance)
    assert compute_squared_error(weight, weighted) > compute_squared_error(weight, plain)


def test_columns_of_zero_importance_add_no_error() -> None:
    weight, importance = torch.randn(5, 64), torch.zeros(64)
    importance[0] = 1
    for format in FORMATS:
        matrix, error = quantize(weight, format, importance)
        assert error < 0.02 and bool(torch.isfinite(matrix.dequantize()).all())
