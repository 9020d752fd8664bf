"""The native recurrences, compared with the plain loops in float64 on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_relative
from native_library import every_instruction_set, needs_native, use_instruction_set
from torch import Tensor

from fledge.core.errors import BackendError
from fledge.kernels import wkv, wkv4
from fledge.kernels.dispatch import prefer
from fledge.kernels.native_ops import wkv_native

pytestmark = needs_native

B, H, K, V = 2, 3, 10, 24  # V is not a multiple of 16, so padding is needed
LENGTHS = (0, 1, 2, 17, 130)
# Relative to the largest value of a tensor. A token adds one product to the state and decays it, so the bound is (2 *
# 130 + 10) * 2**-24 = 1.6e-5 for the longest text and K = 10. The largest error measured is 7.8e-7.
TOLERANCE = 5e-6
DECAYS = {"slow": (-9.0, -5.0), "trained": (-6.0, 0.0), "everything": (-9.0, 4.5)}


def make_inputs(length: int, span: tuple[float, float], values: int = V, keys: int = K) -> list[Tensor]:
    """r, k, v, w, u, state in float64. The log decays are -exp(x), with x spread over `span` in random order."""
    r, k = torch.randn(2, B, length, H, keys, dtype=torch.float64)
    v = torch.randn(B, length, H, values, dtype=torch.float64)
    ramp = -torch.exp(torch.linspace(*span, max(r.numel(), 1), dtype=torch.float64))
    w = ramp[torch.randperm(len(ramp))][: r.numel()].view(r.shape)
    u = torch.randn(H, keys, dtype=torch.float64)
    return [r, k, v, w, u, torch.randn(B, H, keys, values, dtype=torch.float64)]


@every_instruction_set
@pytest.mark.parametrize("values", [1, 16, 24, 64, 70])
@pytest.mark.parametrize("decays", list(DECAYS))
def test_wkv_equals_the_reference(instruction_set: str, decays: str, values: int) -> None:
    for length in LENGTHS:
        tensors = make_inputs(length, DECAYS[decays], values)
        expected = wkv(*tensors, backend="reference")
        with use_instruction_set(instruction_set):
            results = wkv(*(x.float() for x in tensors), backend="native")
        for result, reference in zip(results, expected, strict=True):
            assert result.shape == reference.shape
            assert_close_relative(result, reference, TOLERANCE)


@every_instruction_set
def test_decays_of_exactly_zero_and_one_equal_the_reference(instruction_set: str) -> None:
    r, k, v, w, u, state = (x.float() for x in make_inputs(9, DECAYS["slow"]))
    w = torch.where(torch.arange(K) % 2 == 0, -torch.inf, 0.0).expand_as(w)
    with use_instruction_set(instruction_set):
        y, after = wkv(r, k, v, w, u, state, backend="native")
    expected, expected_after = wkv(*(x.double() for x in (r, k, v, w, u, state)), backend="reference")
    assert_close_relative(y, expected, 1e-6, "y")  # 9 tokens: the bound is (2 * 9 + 10) * 2**-24 = 1.7e-6
    assert_close_relative(after, expected_after, 1e-6, "state")


@every_instruction_set
def test_any_split_gives_the_same_bits(instruction_set: str) -> None:
    r, k, v, w, u, state = (x.float() for x in make_inputs(20, DECAYS["trained"]))
    with use_instruction_set(instruction_set):
        expected, expected_state = wkv(r, k, v, w, u, state, backend="native")
        for cut in range(21):
            y1, middle = wkv(r[:, :cut], k[:, :cut], v[:, :cut], w[:, :cut], u, state, backend="native")
            y2, after = wkv(r[:, cut:], k[:, cut:], v[:, cut:], w[:, cut:], u, middle, backend="native")
            assert torch.equal(torch.cat((y1, y2), 1), expected) and torch.equal(after, expected_state)


def test_the_input_state_is_not_changed_and_strides_do_not_matter() -> None:
    r, k, v, w, u, state = (x.float() for x in make_inputs(6, DECAYS["trained"]))
    before = state.clone()
    y, after = wkv(r, k, v, w, u, state, backend="native")
    assert torch.equal(state, before) and after.data_ptr() != state.data_ptr()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (r, k, v, w)]
    assert torch.equal(wkv(*strided, u, state, backend="native")[0], y)
    static = w[:1, :1].expand_as(w)  # Eagle passes its decay expanded
    assert torch.equal(
        wkv(r, k, v, static, u, backend="native")[0], wkv(r, k, v, static.clone(), u, backend="native")[0]
    )


def test_a_state_that_decays_to_zero_becomes_exactly_zero() -> None:
    """Subnormal numbers become zero, because computing with them is hundreds of times slower."""
    r, k, v, w, u, state = (x.float() for x in make_inputs(400, DECAYS["slow"]))
    k[:, 1:] = 0
    _, after = wkv(r, k, v, torch.full_like(w, -0.3), u, state, backend="native")
    assert not after.any()


@every_instruction_set
@pytest.mark.parametrize("width", [1, 16, 40])
@pytest.mark.parametrize("is_initial", [True, False])
def test_wkv4_equals_the_reference(instruction_set: str, width: int, is_initial: bool) -> None:
    for length in LENGTHS:
        k, v = 3 * torch.randn(2, B, length, width, dtype=torch.float64)
        w = -torch.exp(torch.randn(B, length, width, dtype=torch.float64) * 2 - 2)
        u, aa = torch.randn(width, dtype=torch.float64), torch.randn(B, width, dtype=torch.float64)
        bb, pp = torch.rand(B, width, dtype=torch.float64) + 0.5, torch.randn(B, width, dtype=torch.float64)
        state = (aa * 0, bb * 0, pp * 0 - 1e30) if is_initial else (aa, bb, pp)
        expected, after = wkv4(k, v, w, u, state, backend="reference")
        a32, b32, p32 = (x.float() for x in state)
        with use_instruction_set(instruction_set):
            result, result_after = wkv4(k.float(), v.float(), w.float(), u.float(), (a32, b32, p32), backend="native")
        assert_close_relative(result, expected, TOLERANCE, "y")
        for name, actual, reference in zip(("aa", "bb", "pp"), result_after, after, strict=True):
            assert_close_relative(actual, reference, TOLERANCE, name)


def compute_gradients(tensors: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Gradients of a fixed random projection of y and the state, with respect to all six inputs."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    outputs = wkv(*leaves, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in outputs]
    loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@every_instruction_set
@pytest.mark.parametrize(("keys", "values"), [(10, 24), (1, 1), (16, 70), (64, 64), (70, 3)])
@pytest.mark.parametrize("decays", list(DECAYS))
def test_wkv_gradients_equal_those_of_the_reference(instruction_set: str, decays: str, keys: int, values: int) -> None:
    for length in (*LENGTHS, 16, 33):
        tensors = make_inputs(length, DECAYS[decays], values, keys)
        expected = compute_gradients(tensors, torch.float64, "reference")
        with use_instruction_set(instruction_set):
            results = compute_gradients(tensors, torch.float32, "native")
        for name, result, reference in zip(("r", "k", "v", "w", "u", "state"), results, expected, strict=True):
            assert result.dtype == torch.float32
            assert_close_relative(result, reference, TOLERANCE, name)


@every_instruction_set
def test_gradients_at_decays_of_exactly_zero_and_one_equal_the_reference(instruction_set: str) -> None:
    tensors = make_inputs(40, DECAYS["slow"])
    tensors[3][:, ::3], tensors[3][:, 1::3] = 0.0, -float("inf")
    expected = compute_gradients(tensors, torch.float64, "reference")
    with use_instruction_set(instruction_set):
        results = compute_gradients(tensors, torch.float32, "native")
    for name, result, reference in zip(("r", "k", "v", "w", "u", "state"), results, expected, strict=True):
        assert result.isfinite().all(), name
        assert_close_relative(result, reference, TOLERANCE, name)


@every_instruction_set
def test_gradients_after_a_strong_decay_equal_the_reference(instruction_set: str) -> None:
    """The gradient must not be computed as a difference of large sums."""
    tensors = make_inputs(64, (-12.0, -8.0))
    tensors[3][:, :20] = -2980.0
    expected = compute_gradients(tensors, torch.float64, "reference")[3][:, 20:]
    with use_instruction_set(instruction_set):
        result = compute_gradients(tensors, torch.float32, "native")[3][:, 20:]
    assert_close_relative(result, expected, TOLERANCE)


def test_training_uses_the_library_with_an_expanded_decay() -> None:
    r, k, v, w, u, state = (x.float() for x in make_inputs(20, DECAYS["trained"]))
    static = w[0, 0].clone().requires_grad_()
    y, _ = wkv(r.bfloat16(), k, v, static.expand_as(w), u, state)
    assert y.grad_fn is not None and "wkv_native" in y.grad_fn.name()
    (result,) = torch.autograd.grad(y.square().sum(), static)
    y, _ = wkv(r.bfloat16(), k, v, static.expand_as(w), u, state, backend="reference")
    (expected,) = torch.autograd.grad(y.square().sum(), static)
    assert_close_relative(result, expected, TOLERANCE)
    leaf, state = r.clone().requires_grad_(), state.clone().requires_grad_()
    (first,) = torch.autograd.grad(wkv(leaf, k, v, w, u, state)[0].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(first.square().sum(), state)


def test_a_backend_can_be_preferred() -> None:
    tensors = [x.float() for x in make_inputs(9, DECAYS["trained"])]
    results = {backend: wkv(*tensors, backend=backend)[0] for backend in ("native", "chunked", "reference")}
    assert not torch.equal(results["native"], results["chunked"])
    try:
        for backend in ("chunked", "reference", "native", None):
            prefer(backend)
            assert torch.equal(wkv(*tensors)[0], results[backend or "native"])
    finally:
        prefer(None)


def test_the_kernel_rejects_inputs_that_it_does_not_support() -> None:
    r, k, v, w, u, state = (x.float() for x in make_inputs(5, DECAYS["trained"]))
    with pytest.raises(BackendError, match="without gradients"):
        wkv_native(r.requires_grad_(), k, v, w, u, state)
    y, _ = wkv(r, k, v, w, u, state)
    assert y.requires_grad
    with pytest.raises(BackendError, match="float32 on a CPU"):
        wkv(*(x.detach().double() for x in (r, k, v, w, u, state)), backend="native")


def test_wrong_shapes_and_dtypes_are_rejected() -> None:
    """The library does not check sizes: it would read and write past the end."""
    r, k, v, w, u, state = (x.float() for x in make_inputs(5, DECAYS["trained"]))
    for bad in (
        (r, k, v, w, u, state[:1]),
        (r, k, v, w[:1], u, state),
        (r, k, v, w, u[:2], state),
        (r, k[:, :4], v, w, u, state),
        (r, k, v[:, :4], w, u, state),
    ):
        with pytest.raises(BackendError, match="needs a tensor of"):
            wkv(*bad, backend="native")
    with pytest.raises(BackendError, match="runs float32"):
        wkv_native(*(x.bfloat16() for x in (r, k, v, w, u, state)))


def test_a_transposed_state_of_rwkv4_is_read_correctly() -> None:
    k, v = torch.randn(2, 3, 5, 16)
    w, u = -torch.rand(3, 5, 16), torch.randn(16)
    state = tuple(torch.rand(16, 3).T for _ in range(3))
    expected, after = wkv4(k, v, w, u, state, backend="reference")  # type: ignore[arg-type]
    result, result_after = wkv4(k, v, w, u, state, backend="native")  # type: ignore[arg-type]
    assert_close_relative(result, expected, TOLERANCE, "y")
    for name, actual, reference in zip(("aa", "bb", "pp"), result_after, after, strict=True):
        assert_close_relative(actual, reference, TOLERANCE, name)


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_has_no_effect(default: torch.dtype) -> None:
    """The library writes float32, independent of torch's default dtype."""
    tensors = [x.float().requires_grad_() for x in make_inputs(20, DECAYS["trained"])]

    def differentiate() -> tuple[torch.Tensor, ...]:
        y, state = wkv(*tensors, backend="native")
        return torch.autograd.grad(y.sum() + state.sum(), tensors)

    expected, before = differentiate(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        results = differentiate()
    finally:
        torch.set_default_dtype(before)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=0)
