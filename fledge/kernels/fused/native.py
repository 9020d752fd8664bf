"""The fused operations in the native library (native/isa/training.h), with their gradients.

Only what is expensive to compute again is saved for the gradient.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fledge.kernels.native_ops import check_memory, follow_torch_threads, functions, wkv_native
from fledge.kernels.wkv.native import wkv_gradient

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes of activations, with the library's numbers."""


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the library. Tensors are passed by address; they must be contiguous."""
    follow_torch_threads()
    failed = getattr(functions(), name)(
        *(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
    )
    check_memory(failed, "a training step")


def _addresses(tensors: tuple[Tensor, ...]) -> ctypes.Array[c_void_p]:
    return (c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _sizes(*numbers: int) -> ctypes.Array[c_int64]:
    return (c_int64 * len(numbers))(*numbers)


class MixTokens(torch.autograd.Function):
    """`reference.mix_tokens`. The extra weights, low @ up, are computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        previous: Tensor,
        mix: Tensor,
        low: Tensor | None,
        up: Tensor | None,
        document_start: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        x, previous, mix = x.contiguous(), previous.contiguous(), mix.contiguous()
        ctx.save_for_backward(x, previous, mix, low, up, document_start)
        ctx.dtype = dtype
        sizes = _sizes(*x.shape, mix.shape[0])
        outputs = tuple(torch.empty_like(x, dtype=dtype) for _ in mix)
        extra = None if low is None or up is None else torch.bmm(low, up)
        starts = None if document_start is None else document_start.contiguous()
        _call("fledge_mix", ELEMENTS[dtype], sizes, x, previous, starts, mix, extra, _addresses(outputs))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, previous, mix, low, up, document_start = ctx.saved_tensors
        dy = tuple(
            torch.zeros_like(x, dtype=ctx.dtype) if gradient is None else gradient.contiguous()
            for gradient in gradients
        )
        dx, dprevious, dmix = torch.empty_like(x), torch.empty_like(previous), torch.empty_like(mix)
        extra = dextra = None
        if low is not None:
            extra = torch.bmm(low, up)  # (n, B T, C)
            dextra = torch.empty_like(extra)
        starts = None if document_start is None else document_start.contiguous()
        sizes = _sizes(*x.shape, mix.shape[0])
        inputs = (ELEMENTS[ctx.dtype], sizes, x, previous, starts, mix, extra, _addresses(dy))
        _call("fledge_mix_gradient", *inputs, dx, dprevious, dmix, dextra)
        dlow = dup = None
        if dextra is not None:
            dlow = torch.bmm(dextra, up.transpose(1, 2))
            dup = torch.bmm(low.transpose(1, 2), dextra)
        return dx, dprevious, dmix, dlow, dup, None, None


class GatedNorm(torch.autograd.Function):
    """`reference.gated_norm`. The norm is computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        y, weight, bias = y.contiguous(), weight.contiguous(), bias.contiguous()
        gate = None if gate is None else gate.contiguous()
        ctx.save_for_backward(y, gate, weight, bias)
        ctx.eps = eps
        batch, length, heads, width = y.shape
        out = torch.empty(batch, length, heads * width, dtype=dtype)
        sizes = _sizes(batch * length, heads, width)
        _call("fledge_gated_norm", ELEMENTS[dtype], sizes, eps, y, gate, weight, bias, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight, bias = ctx.saved_tensors
        dout = gradients[0].contiguous()
        batch, length, heads, width = y.shape
        dy, dweight, dbias = torch.empty_like(y), torch.empty_like(weight), torch.empty_like(bias)
        dgate = None if gate is None else torch.empty_like(gate)
        sizes = _sizes(batch * length, heads, width)
        inputs = (ELEMENTS[dout.dtype], sizes, ctx.eps, y, gate, weight, bias, dout)
        _call("fledge_gated_norm_gradient", *inputs, dy, dgate, dweight, dbias)
        return dy, dgate, dweight, dbias, None, None


class SquaredRelu(torch.autograd.Function):
    """`reference.squared_relu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _call("fledge_squared_relu", ELEMENTS[x.dtype], x, x.numel(), y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _call("fledge_squared_relu_gradient", ELEMENTS[x.dtype], x, gradients[0].contiguous(), x.numel(), dx)
        return dx


class GatedValue(torch.autograd.Function):
    """`reference.gated_value`."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, v: Tensor) -> Tensor:
        r, v = r.contiguous(), v.contiguous()
        ctx.save_for_backward(r, v)
        y = torch.empty_like(r, dtype=torch.float32)
        _call("fledge_gated_value", ELEMENTS[r.dtype], r, v, r.numel(), y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        r, v = ctx.saved_tensors
        dr, dv = torch.empty_like(r), torch.empty_like(v)
        dy = gradients[0].contiguous()
        _call("fledge_gated_value_gradient", ELEMENTS[r.dtype], r, v, dy, r.numel(), dr, dv)
        return dr, dv


class WkvWithDecay(torch.autograd.Function):
    """`reference.wkv_with_decay`. The decay is computed again for the gradient, and r, k and v keep their dtype."""

    @staticmethod
    def forward(
        ctx: Any, r: Tensor, k: Tensor, v: Tensor, x: Tensor, base: Tensor, u: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, base = x.contiguous(), base.contiguous()
        ctx.save_for_backward(r, k, v, x, base, u, state)
        decay = _compute_decay(x, base)
        return wkv_native(r.float(), k.float(), v.float(), decay, u, state, is_decay=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        r, k, v, x, base, u, state = ctx.saved_tensors
        decay = _compute_decay(x, base)
        inputs = (r.float(), k.float(), v.float(), decay, u, state)
        dr, dk, dv, dw, du, dstate = wkv_gradient(*inputs, *gradients)
        dbase = torch.empty_like(base)
        _call("fledge_decay_gradient", *_rows_and_width(x), x, base, dw, dw, dbase)
        return dr.to(r.dtype), dk.to(k.dtype), dv.to(v.dtype), dw, dbase, du, dstate


def _rows_and_width(x: Tensor) -> tuple[int, int]:
    """x (B, T, H, K) -> B T, H K."""
    return x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]


def _compute_decay(x: Tensor, base: Tensor) -> Tensor:
    """exp(-exp(base + x)), the factor of the decay."""
    decay = torch.empty_like(x)
    _call("fledge_decay", *_rows_and_width(x), x, base, decay)
    return decay


def cross_entropy_(logits: Tensor, targets: Tensor, pull: float) -> Tensor:
    """`reference.cross_entropy_`. logits: contiguous; targets: int64."""
    losses = torch.empty(len(logits), dtype=torch.float32)
    _call("fledge_cross_entropy", ELEMENTS[logits.dtype], *logits.shape, pull, logits, targets.contiguous(), losses)
    return losses
