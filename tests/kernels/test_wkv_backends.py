"""Every fast form of wkv, compared with the float64 loop: outputs, final state and all gradients."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_relative
from torch import Tensor

from fledge.core.errors import BackendError
from fledge.kernels import WKV_BACKENDS, WKV_NATIVE, explain, wkv

B, H, K, V = 2, 3, 5, 7  # all different, so that no swapped axis can hide
# Relative to the largest value of a tensor. A token adds one product to the state and decays it, so the bound for 257
# tokens and K = 5 is (2 * 257 + 5) * 2**-24 = 3.1e-5. The largest error measured is 4.4e-7.
TOLERANCE = 5e-6
EXACT = 4e-15  # the same in float64, for 19 tokens and more: the bound is 4.8e-15, the largest error measured 4e-16
FAST_BACKENDS = [name for name in WKV_BACKENDS if name != "reference"]


def make_inputs(length: int, raw_decay: tuple[float, float], seed: int = 0) -> list[Tensor]:
    """r, k, v, w, u, state in float64; the raw decay d is spread over the given range and w = -exp(d)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low, high = raw_decay
    raw = low + (high - low) * torch.rand(B, length, H, K, generator=generator, dtype=torch.float64)
    return [
        normal(B, length, H, K),
        normal(B, length, H, K),
        normal(B, length, H, V),
        -torch.exp(raw),
        normal(H, K),
        normal(B, H, K, V),
    ]


def run_backend(backend: str, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, final state, and the gradients of a fixed random projection of both with respect to all six inputs."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    y, state = wkv(*leaves, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)  # T = 0 uses the state only
    return y.detach(), state.detach(), list(grads)


DECAYS = {
    "slow": (-12.0, -8.0),
    "trained": (-6.0, 1.0),
    "fast": (2.0, 8.0),
    "everything": (-12.0, 8.0),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [0, 1, 15, 64, 257])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_float32_backend_equals_float64_reference(backend: str, length: int, decay: str) -> None:
    tensors = make_inputs(length, DECAYS[decay])
    expected = run_backend("reference", tensors, torch.float64)
    result = run_backend(backend, tensors, torch.float32)
    assert_close_relative(result[0], expected[0], TOLERANCE, "y")
    assert_close_relative(result[1], expected[1], TOLERANCE, "state")
    for name, actual, reference in zip(("r", "k", "v", "w", "u", "state"), result[2], expected[2], strict=True):
        assert_close_relative(actual, reference, TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_float64_backend_is_exact(backend: str) -> None:
    tensors = make_inputs(70, DECAYS["everything"])
    expected, result = run_backend("reference", tensors, torch.float64), run_backend(backend, tensors, torch.float64)
    assert_close_relative(result[0], expected[0], EXACT, "y")
    assert_close_relative(result[1], expected[1], EXACT, "state")
    for name, actual, reference in zip(("r", "k", "v", "w", "u", "state"), result[2], expected[2], strict=True):
        assert_close_relative(actual, reference, EXACT, f"gradient of {name}")


def test_second_derivatives_raise_an_error() -> None:
    leaves = [x.requires_grad_() for x in make_inputs(9, DECAYS["trained"])]
    y, _ = wkv(*leaves, backend="chunked")
    (first,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(first.square().sum(), leaves[5])


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_decays_of_exactly_zero_and_one_equal_the_reference(backend: str) -> None:
    """w = -inf erases the state and w = 0 keeps all of it. Neither may give nan."""
    tensors = make_inputs(33, DECAYS["trained"])
    tensors[3][:, ::3] = 0.0
    tensors[3][:, 1::3] = -float("inf")
    with torch.no_grad():
        y, state = wkv(*tensors, backend=backend)
        expected_y, expected_state = wkv(*tensors, backend="reference")
    assert_close_relative(y, expected_y, EXACT, "y")
    assert_close_relative(state, expected_state, EXACT, "state")


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_results_after_a_strong_decay_equal_the_reference(backend: str) -> None:
    """Results after very fast decays must not be computed as differences of large sums, which lose precision."""
    tensors = make_inputs(64, DECAYS["slow"])
    tensors[3][:, :20] = -2980.0
    expected = run_backend("reference", tensors, torch.float64)
    result = run_backend(backend, tensors, torch.float32)
    assert_close_relative(result[0], expected[0], TOLERANCE, "y")
    assert_close_relative(result[2][3][:, 20:], expected[2][3][:, 20:], TOLERANCE, "gradient of w")


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_any_split_gives_the_same_result(backend: str) -> None:
    tensors = make_inputs(19, DECAYS["everything"])
    expected_y, expected_state = wkv(*tensors, backend=backend)
    for cut in range(20):
        first = [x[:, :cut] for x in tensors[:4]]
        second = [x[:, cut:] for x in tensors[:4]]
        y1, state = wkv(*first, *tensors[4:], backend=backend)
        y2, state = wkv(*second, tensors[4], state, backend=backend)
        assert_close_relative(torch.cat((y1, y2), 1), expected_y, EXACT, "y")
        assert_close_relative(state, expected_state, EXACT, "state")


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_an_expanded_decay_and_bfloat16_inputs_are_supported(backend: str) -> None:
    r, k, v, _, u, state = make_inputs(9, DECAYS["trained"])
    w = torch.linspace(-3, -0.01, H * K).view(1, 1, H, K).expand(B, 9, H, K)
    r, k, v = (x.bfloat16() for x in (r, k, v))
    y, after = wkv(r, k, v, w, u.float(), state.float(), backend=backend)
    expected, _ = wkv(r.double(), k.double(), v.double(), w.double(), u, state, backend="reference")
    assert y.dtype == after.dtype == torch.float32
    assert_close_relative(y, expected, 1e-6, "y")  # 9 tokens: the bound is (2 * 9 + 5) * 2**-24 = 1.4e-6


def test_inputs_are_not_changed() -> None:
    tensors = make_inputs(8, DECAYS["trained"])
    before = [x.clone() for x in tensors]
    for backend in WKV_BACKENDS:
        wkv(*tensors, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_the_error_for_an_unknown_backend_lists_the_choices() -> None:
    with pytest.raises(BackendError, match=r"'fast'.*reference, chunked"):
        wkv(*make_inputs(2, DECAYS["slow"]), backend="fast")


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_an_empty_batch_is_valid(backend: str) -> None:
    tensors = [x[:0] if x.dim() == 4 else x for x in make_inputs(9, DECAYS["trained"])]
    y, state = wkv(*tensors, backend=backend)
    assert y.shape == (0, 9, H, V) and state.shape == (0, H, K, V)


def test_explain_lists_existing_backends() -> None:
    choices = explain()
    backends = {*WKV_BACKENDS, *WKV_NATIVE}
    assert {choice.backend for choice in choices if choice.kernel.startswith("wkv")} <= backends
    assert {choice.backend for choice in choices if choice.kernel == "linear"} <= {"plain", "packed"}
    assert {choice.backend for choice in choices if choice.kernel == "whole model"} <= {"native", "torch"}
    assert all(choice.reason for choice in choices)
