"""Check that every kernel backend computes correct results on this machine. It takes a few seconds and reads no files.

Each backend runs in float32 on each device. Its outputs, final state and all gradients are compared with the reference
loop in float64. The decays range from almost 0 to almost 1 and all sizes differ, so a wrong axis, a clamp or a broken
instruction is detected. The tests of the repository cover far more cases; this check is about the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.kernels import WKV4_BACKENDS, WKV_BACKENDS, native_ops, pack, packed_linear, why_not_packable, wkv, wkv4
from fledge.kernels.rounding import quantize
from fledge.native.library import why_missing

TOLERANCE = 1e-4
"""Largest accepted error, relative to the largest number of the tensor. Rounding causes about 1% of it."""

BATCH, LENGTH, HEADS, KEY, VALUE = 2, 77, 3, 16, 24

Kernel = Callable[[Sequence[Tensor], str | None], list[Tensor]]
"""(inputs, backend) -> outputs and states."""


@dataclass(frozen=True)
class KernelCheck:
    """One backend on one device, with its largest error in outputs and states, and in gradients."""

    kernel: str
    backend: str
    device: str
    error: float
    gradient_error: float
    problem: str = ""  # the exception, if there was one

    @property
    def passed(self) -> bool:
        """Whether both errors are within TOLERANCE. NaN is not."""
        return not self.problem and self.error <= TOLERANCE and self.gradient_error <= TOLERANCE


def check_kernels() -> list[KernelCheck]:
    """Check every backend on every available device."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    checks = [
        _check(kernel, name, backend, inputs, device)
        for kernel, name, backends, inputs in (
            (_run_wkv, "wkv", WKV_BACKENDS, _wkv_inputs()),
            (_run_wkv4, "wkv4", WKV4_BACKENDS, _wkv4_inputs()),
        )
        for device in devices
        for backend in backends
    ]
    if why_missing() is None:
        checks += [
            _check(_run_wkv, "wkv", "native", _wkv_inputs(), "cpu"),
            _check_inference(_run_wkv4, "wkv4", _wkv4_inputs()),
        ]
        checks += [_check_native_product(format) for format in native_ops.FORMATS]
    return checks if why_not_packable(torch.float32) else [*checks, _check_packed()]


def _check_inference(kernel: Kernel, name: str, inputs: Sequence[Tensor]) -> KernelCheck:
    """Check a native recurrence. It has no gradient."""
    expected = kernel([tensor.double() for tensor in inputs], "reference")
    try:
        actual = kernel([tensor.float() for tensor in inputs], "native")
    except Exception as error:  # as in `_check`: reported, not raised
        return KernelCheck(name, "native", "cpu", math.inf, 0.0, f"{type(error).__name__}: {error}")
    return KernelCheck(
        name, "native", "cpu", _relative_error([_to_cpu64(x) for x in actual], [_to_cpu64(x) for x in expected]), 0.0
    )


def _check_native_product(format: str) -> KernelCheck:
    """Check native products of a matrix and of a single row with weights in one storage format."""
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(7, 70, generator=draw), torch.randn(150, 70, generator=draw)
    if format.startswith("bfloat16"):
        x, weight = x.bfloat16().float(), weight.bfloat16()
    if format == "float16 exact":
        weight = weight.half()
    if format in ("int8", "int4"):
        rounded, _ = quantize(weight, format)
        matrix, dense = native_ops.PackedMatrix.from_quantized(rounded), rounded.dequantize(torch.float64)
    else:
        matrix, dense = native_ops.pack(weight, format), weight.double()
    expected = x.double() @ dense.T
    actual = torch.cat((native_ops.matmul(x, matrix), native_ops.matmul(x[:1], matrix, sparse=True)))
    error = _relative_error([_to_cpu64(actual)], [torch.cat((expected, expected[:1]))])
    return KernelCheck(f"product, {format}", f"native, {native_ops.instruction_set()}", "cpu", error, 0.0)


def _check_packed() -> KernelCheck:
    """Check the product with packed weights. It has no gradient."""
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(3, 70, generator=draw), torch.randn(50, 70, generator=draw)
    actual, expected = packed_linear(x, pack(weight)), x.double() @ weight.double().T
    return KernelCheck("linear", "packed", "cpu", _relative_error([_to_cpu64(actual)], [expected]), 0.0)


def _check(kernel: Kernel, name: str, backend: str, inputs: Sequence[Tensor], device: str) -> KernelCheck:
    expected, expected_gradients = _results(kernel, inputs, "reference", torch.float64, "cpu")
    try:
        actual, gradients = _results(kernel, inputs, backend, torch.float32, device)
    except Exception as error:  # whatever a kernel raises is a result of the check
        return KernelCheck(name, backend, device, math.inf, math.inf, f"{type(error).__name__}: {error}")
    return KernelCheck(
        name, backend, device, _relative_error(actual, expected), _relative_error(gradients, expected_gradients)
    )


def _results(
    kernel: Kernel, inputs: Sequence[Tensor], backend: str, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the gradients of a fixed weighted sum of them, in float64 on the CPU."""
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
    outputs = kernel(leaves, backend)
    weights = torch.Generator().manual_seed(2)
    total = sum((out * torch.randn(out.shape, generator=weights).to(out)).sum() for out in outputs)
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, leaves)
    return [_to_cpu64(out) for out in outputs], [_to_cpu64(gradient) for gradient in gradients]


def _to_cpu64(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference in any tensor relative to its largest number, or NaN if any value is NaN."""
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _run_wkv(inputs: Sequence[Tensor], backend: str | None) -> list[Tensor]:
    r, k, v, w, u, state = inputs
    return list(wkv(r, k, v, w, u, state, backend=backend))


def _run_wkv4(inputs: Sequence[Tensor], backend: str | None) -> list[Tensor]:
    k, v, w, u, aa, bb, pp = inputs
    y, state = wkv4(k, v, w, u, (aa, bb, pp), backend=backend)
    return [y, *state]


def _decays(*shape: int) -> Tensor:
    """Log decays from -7e-4 (a factor of 0.9993 per token) to -20 (a factor of about 0), in random order."""
    ramp = -torch.exp(torch.linspace(-7.3, 3.0, math.prod(shape)))
    return ramp[torch.randperm(len(ramp), generator=torch.Generator().manual_seed(3))].reshape(shape)


def _wkv_inputs() -> list[Tensor]:
    """r, k, v, w, u, state."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(BATCH, LENGTH, HEADS, KEY)] * 2 + [(BATCH, LENGTH, HEADS, VALUE)]
    r, k, v = (torch.randn(shape, generator=draw) for shape in shapes)
    u = torch.randn(HEADS, KEY, generator=draw)
    state = torch.randn(BATCH, HEADS, KEY, VALUE, generator=draw)
    return [r, k, v, _decays(BATCH, LENGTH, HEADS, KEY), u, state]


def _wkv4_inputs() -> list[Tensor]:
    """k, v, w, u and the state aa, bb, pp."""
    draw = torch.Generator().manual_seed(1)
    k, v = (torch.randn(BATCH, LENGTH, KEY, generator=draw) for _ in range(2))
    u, aa = torch.randn(KEY, generator=draw), torch.randn(BATCH, KEY, generator=draw)
    bb, pp = torch.rand(BATCH, KEY, generator=draw) + 0.5, torch.randn(BATCH, KEY, generator=draw)
    return [k, v, _decays(BATCH, LENGTH, KEY), u, aa, bb, pp]
