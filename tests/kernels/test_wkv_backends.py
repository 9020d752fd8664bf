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
TWINS = [name for name in WKV_BACKENDS if name != "reference"]


def inputs(length: int, raw_decay: tuple[float, float], seed: int = 0) -> list[Tensor]:
    """r, k, v, w, u, state in float64; the raw decay d is spread over the given range and w = -exp(d)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    low, high = raw_decay
    raw = low + (high - low) * torch.rand(B, length, H, K, generator=g, dtype=torch.float64)
    return [
        normal(B, length, H, K),
        normal(B, length, H, K),
        normal(B, length, H, V),
        -torch.exp(raw),
        normal(H, K),
        normal(B, H, K, V),
    ]


def run(backend: str, arguments: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, final state, and the gradients of a fixed random projection of both with respect to all six inputs."""
    leaves = [x.to(dtype).requires_grad_() for x in arguments]
    y, state = wkv(*leaves, backend=backend)
    g = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=g, dtype=torch.float64).to(dtype)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=g, dtype=torch.float64).to(dtype)).sum()
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
@pytest.mark.parametrize("backend", TWINS)
def test_float32_backend_equals_float64_reference(backend: str, length: int, decay: str) -> None:
    arguments = inputs(length, DECAYS[decay])
    expected = run("reference", arguments, torch.float64)
    found = run(backend, arguments, torch.float32)
    assert_close_relative(found[0], expected[0], TOLERANCE, "y")
    assert_close_relative(found[1], expected[1], TOLERANCE, "state")
    for name, ours, theirs in zip(("r", "k", "v", "w", "u", "state"), found[2], expected[2], strict=True):
        assert_close_relative(ours, theirs, TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("backend", TWINS)
def test_float64_backend_is_exact(backend: str) -> None:
    arguments = inputs(70, DECAYS["everything"])
    expected, found = run("reference", arguments, torch.float64), run(backend, arguments, torch.float64)
    assert_close_relative(found[0], expected[0], EXACT, "y")
    assert_close_relative(found[1], expected[1], EXACT, "state")
    for name, ours, theirs in zip(("r", "k", "v", "w", "u", "state"), found[2], expected[2], strict=True):
        assert_close_relative(ours, theirs, EXACT, f"gradient of {name}")


def test_second_derivatives_raise_an_error() -> None:
    leaves = [x.requires_grad_() for x in inputs(9, DECAYS["trained"])]
    y, _ = wkv(*leaves, backend="chunked")
    (first,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(first.square().sum(), leaves[5])


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_decay_of_exactly_zero_and_one(backend: str) -> None:
    """w = -inf erases the state, w = 0 keeps all of it; neither may give nan."""
    arguments = inputs(33, DECAYS["trained"])
    arguments[3][:, ::3] = 0.0
    arguments[3][:, 1::3] = -float("inf")
    with torch.no_grad():
        y, state = wkv(*arguments, backend=backend)
        expected_y, expected_state = wkv(*arguments, backend="reference")
    assert_close_relative(y, expected_y, EXACT, "y")
    assert_close_relative(state, expected_state, EXACT, "state")


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_strong_decay_does_not_blur_what_follows(backend: str) -> None:
    """Slow decays after very fast ones must keep their precision: no difference of large sums may be taken."""
    arguments = inputs(64, DECAYS["slow"])
    arguments[3][:, :20] = -2980.0
    expected = run("reference", arguments, torch.float64)
    found = run(backend, arguments, torch.float32)
    assert_close_relative(found[0], expected[0], TOLERANCE, "y")
    assert_close_relative(found[2][3][:, 20:], expected[2][3][:, 20:], TOLERANCE, "gradient of w")


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_split_anywhere(backend: str) -> None:
    arguments = inputs(19, DECAYS["everything"])
    whole_y, whole_state = wkv(*arguments, backend=backend)
    for cut in range(20):
        first = [x[:, :cut] for x in arguments[:4]]
        second = [x[:, cut:] for x in arguments[:4]]
        y1, state = wkv(*first, *arguments[4:], backend=backend)
        y2, state = wkv(*second, arguments[4], state, backend=backend)
        assert_close_relative(torch.cat((y1, y2), 1), whole_y, EXACT, "y")
        assert_close_relative(state, whole_state, EXACT, "state")


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_an_expanded_static_decay_and_low_precision_inputs(backend: str) -> None:
    r, k, v, _, u, state = inputs(9, DECAYS["trained"])
    w = torch.linspace(-3, -0.01, H * K).view(1, 1, H, K).expand(B, 9, H, K)
    r, k, v = (x.bfloat16() for x in (r, k, v))
    y, after = wkv(r, k, v, w, u.float(), state.float(), backend=backend)
    expected, _ = wkv(r.double(), k.double(), v.double(), w.double(), u, state, backend="reference")
    assert y.dtype == after.dtype == torch.float32
    assert_close_relative(y, expected, 1e-6, "y")  # 9 tokens: the bound is (2 * 9 + 5) * 2**-24 = 1.4e-6


def test_inputs_are_not_changed() -> None:
    arguments = inputs(8, DECAYS["trained"])
    before = [x.clone() for x in arguments]
    for backend in WKV_BACKENDS:
        wkv(*arguments, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


def test_unknown_backend_names_the_choices() -> None:
    with pytest.raises(BackendError, match=r"'fast'.*reference, chunked"):
        wkv(*inputs(2, DECAYS["slow"]), backend="fast")


@pytest.mark.parametrize("backend", list(WKV_BACKENDS))
def test_an_empty_batch(backend: str) -> None:
    arguments = [x[:0] if x.dim() == 4 else x for x in inputs(9, DECAYS["trained"])]
    y, state = wkv(*arguments, backend=backend)
    assert y.shape == (0, 9, H, V) and state.shape == (0, H, K, V)


def test_explain_names_real_backends() -> None:
    choices = explain()
    known = {*WKV_BACKENDS, *WKV_NATIVE}
    assert {choice.backend for choice in choices if choice.kernel.startswith("wkv")} <= known
    assert {choice.backend for choice in choices if choice.kernel == "linear"} <= {"plain", "packed"}
    assert {choice.backend for choice in choices if choice.kernel == "whole model"} <= {"native", "torch"}
    assert all(choice.reason for choice in choices)
