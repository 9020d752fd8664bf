"""Comparison of floating-point results, and the same computation in float64 as a reference.

The error of a result is its largest difference from the expected tensor, divided by the largest expected value. An
absolute tolerance fits only values near 1. The sums in a wkv state, gradients and losses have other magnitudes, and the
rounding of a float32 sum grows with its terms.

How to choose a tolerance. Two float32 results that should be equal differ by the order in which sums are taken. The
order depends on the instruction set, the number of threads and the version of torch, and no order is the right one.
Let u be the unit roundoff, 2**-24. A sum of n products is exact to `n * u` of the sum of their absolute values, in
every order. A model normalizes the input of each sub-layer and adds the output to the residual stream, so to first
order its logits and states are exact to `2 * layers * n * u`, where n is the number of terms of the longest sum. Two
float32 results may both be off, so the bound for their difference is twice that. A tolerance must stay below the bound,
because a larger difference has a cause other than rounding. It should be several times the measured error, because
another processor takes the sums in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The largest relative error of one rounding to each dtype."""

MODEL_TOLERANCE = 1e-5
"""For logits and states of the small models in these tests, computed in two ways. The smallest have two layers and sums
of 40 terms, so each side may be off by 2 * 2 * 40 * 2**-24 = 9.5e-6. The largest difference measured is 4.4e-6, for
RWKV-5.0 read token by token with MKL's AVX-512 kernels."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, divided by the largest expected value. 0 for equal tensors, nan where either holds nan.

    Infinite where `expected` is zero everywhere and `actual` is not.
    """
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    if not expected.numel():
        return 0.0
    difference = float((actual.detach().double() - expected.detach().double()).abs().max())
    size = float(expected.detach().double().abs().max())
    if size == 0:
        return math.inf if difference else 0.0
    return difference / size


def assert_close_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "result") -> None:
    """Raise AssertionError unless `relative_error` is at most `tolerance`."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, tolerance {tolerance:.1e}"


@contextmanager
def float64_arithmetic() -> Iterator[None]:
    """Make models compute in float64 what they compute in float32: inside, `tensor.float()` gives float64.

    The models cast with `.float()` wherever they need float32, and their kernels keep float64. Convert the weights with
    `model.double()` first.
    """
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield
