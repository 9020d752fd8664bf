"""The chunked form of RWKV-4's recurrence, compared with the float64 loop."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_relative
from torch import Tensor

from fledge.kernels import wkv4

B, A = 2, 5
# Relative to the largest value of a tensor. A token adds one product to each sum and decays it, so the bound for 257
# tokens is 2 * 257 * 2**-24 = 3.1e-5. The largest error measured is 9.2e-7.
TOLERANCE = 5e-6
EXACT = 4e-15  # the same in float64, for 37 tokens: the bound is 8.2e-15, the largest error measured 9e-16


def make_inputs(length: int, raw_decay: tuple[float, float], is_initial: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low, high = raw_decay
    w = -torch.exp(low + (high - low) * torch.rand(B, length, A, generator=generator, dtype=torch.float64))
    k, v, u = 8 * normal(B, length, A), normal(B, length, A), normal(A)
    if is_initial:
        zeros = torch.zeros(B, A, dtype=torch.float64)
        return [k, v, w, u, zeros, zeros.clone(), torch.full_like(zeros, -1e30)]
    return [k, v, w, u, normal(B, A), normal(B, A).abs(), 3 * normal(B, A)]


def run_backend(backend: str, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the state aa / bb, which does not depend on pp, and gradients with respect to k, v, w, u, aa, bb."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors[:6]]
    y, (aa, bb, _) = wkv4(*leaves[:4], (leaves[4], leaves[5], tensors[6].to(dtype)), backend=backend)
    mean = aa / bb if y.shape[1] else aa
    generator = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
    loss = loss + (mean * torch.randn(mean.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)  # T = 0 uses the state only
    return y.detach(), mean.detach(), list(grads)


@pytest.mark.parametrize("is_initial", [True, False], ids=["initial", "continued"])
@pytest.mark.parametrize("decay", [(-12.0, -8.0), (-6.0, 1.0), (2.0, 8.0), (-12.0, 8.0)])
@pytest.mark.parametrize("length", [0, 1, 15, 64, 257])
def test_chunked_equals_reference(length: int, decay: tuple[float, float], is_initial: bool) -> None:
    tensors = make_inputs(length, decay, is_initial)
    expected, result = run_backend("reference", tensors, torch.float64), run_backend("chunked", tensors, torch.float32)
    assert_close_relative(result[0], expected[0], TOLERANCE, "y")
    assert_close_relative(result[1], expected[1], TOLERANCE, "state")
    for name, actual, reference in zip(("k", "v", "w", "u", "aa", "bb"), result[2], expected[2], strict=True):
        assert_close_relative(actual, reference, TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_any_split_gives_the_same_result(backend: str) -> None:
    k, v, w, u, aa, bb, pp = make_inputs(37, (-6.0, 1.0), is_initial=False)
    expected, (expected_aa, expected_bb, expected_pp) = wkv4(k, v, w, u, (aa, bb, pp), backend=backend)
    for cut in range(38):
        y1, state = wkv4(k[:, :cut], v[:, :cut], w[:, :cut], u, (aa, bb, pp), backend=backend)
        y2, state = wkv4(k[:, cut:], v[:, cut:], w[:, cut:], u, state, backend=backend)
        assert_close_relative(torch.cat((y1, y2), 1), expected, EXACT, "y")
        assert_close_relative(state[0] / state[1], expected_aa / expected_bb, EXACT, "mean")
        assert_close_relative(state[1].log() + state[2], expected_bb.log() + expected_pp, EXACT, "log weight")
