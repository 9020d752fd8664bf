"""Products with packed weights against torch's own, for every number of rows and both dtypes."""

from __future__ import annotations

import pytest
import torch

from fledge.kernels import explain, pack, packed_linear, why_not_packable

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (5, 3), (1, 257)], ids=str)
@pytest.mark.parametrize("shape", [(96, 33), (7, 768), (513, 64)], ids=str)
def test_packed_equals_linear(dtype: torch.dtype, rows: tuple[int, ...], shape: tuple[int, int]) -> None:
    if reason := why_not_packable(dtype):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, shape[1], generator=g).to(dtype)
    weight = torch.randn(*shape, generator=g).to(dtype)
    found = packed_linear(x, pack(weight))
    expected = x.double() @ weight.double().T
    assert found.shape == expected.shape and found.dtype == dtype
    scale = shape[1] ** 0.5
    torch.testing.assert_close(
        found.double() / scale, expected / scale, rtol=0, atol=1e-5 if dtype.itemsize == 4 else 2e-2
    )


def test_a_transposed_weight_is_packed_as_it_reads() -> None:
    if reason := why_not_packable(torch.float32):
        pytest.skip(reason)
    weight = torch.randn(20, 30).T
    x = torch.randn(4, 20)
    torch.testing.assert_close(packed_linear(x, pack(weight)), x @ weight.T, rtol=1e-5, atol=1e-4)


def test_other_dtypes_are_refused_with_a_reason() -> None:
    assert "float16" in str(why_not_packable(torch.float16))


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.kernels.dispatch.why_missing", lambda: "not built")
    choice = next(c for c in explain() if c.kernel == "linear" and "inference" in c.situation)
    assert choice.backend == ("plain" if why_not_packable(torch.float32) else "packed")
