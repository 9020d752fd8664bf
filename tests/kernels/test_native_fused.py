"""The fused operations in the native library, compared with their reference: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from closeness import UNIT_ROUNDOFF, assert_close_relative
from native_library import every_instruction_set, needs_native, use_instruction_set
from torch import Tensor

from fledge.kernels.dispatch import prefer
from fledge.kernels.fused import dispatch, native, reference

pytestmark = needs_native

B, T, H, N, M = 2, 301, 3, 16, 7  # several blocks of rows, and an incomplete one
C = H * N
# Sums over heads, mixes and rows have at most 602 terms, so the bound is 2 * 602 * 2**-24 = 7e-5. The largest error
# measured is 7e-7.
TOLERANCE = 5e-6
# Results of bfloat16 may be rounded to different neighbors if their float32 values differ.
ROUNDED = 2 * UNIT_ROUNDOFF[torch.bfloat16]

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of a random projection of the outputs with respect to all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = operation(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs])
    gradients = [x.grad for x in leaves]
    assert all(gradient is not None for gradient in gradients)
    return [*(y.detach() for y in outputs), *(gradient for gradient in gradients if gradient is not None)]


def check(name: str, fused: Operation, expected: Operation, inputs: Sequence[Tensor]) -> None:
    """Raise AssertionError unless both operations have the same outputs and gradients, up to rounding."""
    for i, (actual, wanted) in enumerate(zip(run(fused, inputs), run(expected, inputs), strict=True)):
        assert actual.dtype == wanted.dtype
        tolerance = ROUNDED if actual.dtype == torch.bfloat16 else TOLERANCE
        assert_close_relative(actual, wanted, tolerance, f"{name}, result {i}")


@every_instruction_set
@every_dtype
@pytest.mark.parametrize("has_starts", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_mix_tokens_equals_the_reference(
    instruction_set: str, dtype: torch.dtype, has_starts: bool, count: int
) -> None:
    starts = (normal(B, T, 1) > 1.5) if has_starts else None
    inputs = [normal(B, T, C), normal(B, C), normal(count, C), normal(count, B * T, M), normal(count, M, C)]

    def fused(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = native.MixTokens.apply(*tensors, starts, dtype)
        return outputs

    def expected(*tensors: Tensor) -> tuple[Tensor, ...]:
        return reference.mix_tokens(*tensors, document_start=starts, dtype=dtype)

    with use_instruction_set(instruction_set):
        check("with low-rank weights", fused, expected, inputs)
        check("static", lambda x, first, mix: fused(x, first, mix, None, None), expected, inputs[:3])


def test_mixes_that_are_not_used_have_no_gradient() -> None:
    x, mix = normal(B, T, C).requires_grad_(), normal(2, C).requires_grad_()
    first, _ = dispatch.mix_tokens(x, normal(B, C), mix, dtype=torch.float32)
    first.sum().backward()
    assert mix.grad is not None and mix.grad[0].abs().max() > 0 and mix.grad[1].abs().max() == 0


@every_instruction_set
@every_dtype
@pytest.mark.parametrize("has_gate", [False, True])
def test_gated_norm_equals_the_reference(instruction_set: str, dtype: torch.dtype, has_gate: bool) -> None:
    # The gate takes values at which silu is flat, linear and in between.
    gates = [normal(B, T, C, scale=9.0).to(dtype)] if has_gate else []
    inputs = [normal(B, T, H, N, scale=1e-3), normal(C), normal(C), *gates]
    with use_instruction_set(instruction_set):
        check(
            "gated norm",
            lambda y, w, b, *gate: native.GatedNorm.apply(y, gate[0] if gate else None, w, b, 64e-5, dtype),
            lambda y, w, b, *gate: reference.gated_norm(y, gate[0] if gate else None, w, b, 64e-5, dtype),
            inputs,
        )


@every_instruction_set
@every_dtype
def test_feed_forward_operations_equal_the_reference(instruction_set: str, dtype: torch.dtype) -> None:
    x, y = normal(B, T, C, scale=30.0).to(dtype), normal(B, T, C).to(dtype)
    with use_instruction_set(instruction_set):
        check("squared relu", native.SquaredRelu.apply, reference.squared_relu, [x])
        check("gated value", native.GatedValue.apply, reference.gated_value, [x, y])


@every_instruction_set
@every_dtype
@pytest.mark.parametrize("raw_decay", [-12.0, 0.0, 5.0])
def test_wkv_with_decay_equals_the_reference(instruction_set: str, dtype: torch.dtype, raw_decay: float) -> None:
    shape = (B, T, H, N)
    r, k, v = (normal(*shape, seed=seed).to(dtype) for seed in range(3))
    x, base, u, state = normal(*shape, seed=3), normal(C) + raw_decay, normal(H, N), normal(B, H, N, N)
    with use_instruction_set(instruction_set):
        check("wkv", native.WkvWithDecay.apply, reference.wkv_with_decay, [r, k, v, x, base, u, state])


@every_instruction_set
@every_dtype
@pytest.mark.parametrize("vocabulary", [1, 37, 800])
def test_cross_entropy_equals_the_reference(instruction_set: str, dtype: torch.dtype, vocabulary: int) -> None:
    logits = normal(21, vocabulary, scale=20.0).to(dtype)
    targets = torch.randint(vocabulary, (21,), generator=torch.Generator().manual_seed(0))
    gradient, expected_gradient = logits.clone(), logits.clone()
    with use_instruction_set(instruction_set):
        loss = native.cross_entropy_(gradient, targets, 1e-2)
    assert_close_relative(loss, reference.cross_entropy_(expected_gradient, targets, 1e-2), TOLERANCE, "loss")
    assert_close_relative(gradient, expected_gradient, TOLERANCE if dtype == torch.float32 else ROUNDED, "gradient")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_cross_entropy_of_logits_that_are_not_finite_is_nan(value: float) -> None:
    logits = normal(2, 40)
    logits[1, 33] = value
    losses = native.cross_entropy_(logits, torch.tensor([0, 5]), 1e-4)
    assert bool(losses[0].isfinite()) and bool(losses[1].isnan())


@every_instruction_set
def test_results_do_not_depend_on_the_number_of_threads(instruction_set: str) -> None:
    inputs = [normal(B, T, C), normal(B, C), normal(5, C), normal(5, B * T, M), normal(5, M, C)]
    norm_inputs = [normal(B, T, H, N), normal(B, T, C), normal(C), normal(C)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with use_instruction_set(instruction_set):
                mixed = run(lambda *tensors: native.MixTokens.apply(*tensors, None, torch.float32), inputs)
                normed = run(lambda *tensors: native.GatedNorm.apply(*tensors, 1e-5, torch.float32), norm_inputs)
            results.append([*mixed[:8], mixed[8], *normed])
    finally:
        torch.set_num_threads(threads)
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


def test_the_reference_is_used_where_the_library_cannot_be() -> None:
    """A width that is not a multiple of 16, float64, and an explicit choice of the backend."""
    assert not dispatch.can_fuse(normal(3), 8) and not dispatch.can_fuse(normal(3).double(), 16)
    assert dispatch.can_fuse(normal(3), 16)
    inputs = (normal(B, T, 9), normal(B, 9), normal(2, 9))
    for actual, expected in zip(
        dispatch.mix_tokens(*inputs, dtype=torch.float32),
        reference.mix_tokens(*inputs, dtype=torch.float32),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_a_preferred_backend_is_used_for_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (B, T, H, N)
    inputs = [*(normal(*shape, seed=seed) for seed in range(4)), normal(C), normal(H, N), normal(B, H, N, N)]
    expected, _ = reference.wkv_with_decay(*inputs)
    monkeypatch.setattr(native.WkvWithDecay, "forward", lambda *arguments: pytest.fail("the native form was used"))
    prefer("chunked")
    try:
        y, _ = dispatch.wkv_with_decay(*inputs)
    finally:
        prefer(None)
    assert_close_relative(y, expected, TOLERANCE)
