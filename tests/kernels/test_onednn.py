"""Products with packed weights, compared with torch's own, for several numbers of rows and both dtypes."""

from __future__ import annotations

import pytest
import torch
from closeness import UNIT_ROUNDOFF, assert_close_relative

from fledge.kernels import explain, pack, packed_linear, why_not_packable

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (5, 3), (1, 257)], ids=str)
@pytest.mark.parametrize("shape", [(96, 33), (7, 768), (513, 64)], ids=str)
def test_packed_products_equal_plain_products(
    dtype: torch.dtype, rows: tuple[int, ...], shape: tuple[int, int]
) -> None:
    if reason := why_not_packable(dtype):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, shape[1], generator=generator).to(dtype)
    weight = torch.randn(*shape, generator=generator).to(dtype)
    result = packed_linear(x, pack(weight))
    expected = x.double() @ weight.double().T
    assert result.shape == expected.shape and result.dtype == dtype
    # The bound of a float32 sum, or less for the longest ones, and one more rounding of the sum to bfloat16. The
    # largest error measured in float32 is 1.1e-6, for 768 terms with oneDNN's AVX2 kernels.
    tolerance = min(shape[1] * UNIT_ROUNDOFF[torch.float32], 5e-6)
    assert_close_relative(result, expected, tolerance + (UNIT_ROUNDOFF[dtype] if dtype == torch.bfloat16 else 0))


def test_a_transposed_weight_is_packed_correctly() -> None:
    if reason := why_not_packable(torch.float32):
        pytest.skip(reason)
    weight = torch.randn(20, 30).T
    x = torch.randn(4, 20)
    # A float32 sum of 20 terms is exact to 20 * 2**-24 = 1.2e-6.
    assert_close_relative(packed_linear(x, pack(weight)), x.double() @ weight.double().T, 1e-6)


def test_other_dtypes_are_rejected_with_a_reason() -> None:
    assert "float16" in str(why_not_packable(torch.float16))


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.kernels.dispatch.why_missing", lambda: "not built")
    choice = next(c for c in explain() if c.kernel == "linear" and "inference" in c.situation)
    assert choice.backend == ("plain" if why_not_packable(torch.float32) else "packed")
