"""Choose between the native and the reference form of a fused operation."""

from __future__ import annotations

import torch
from torch import Tensor

from fledge.kernels.dispatch import preferred
from fledge.kernels.fused import native, reference
from fledge.native.library import library

LANES = 16
"""The native kernels process this number of floats at a time, so a width must be a multiple of it."""


def can_fuse(x: Tensor, *widths: int) -> bool:
    """Whether the native form supports x: on the CPU, float32 or bfloat16, with these widths."""
    if torch.compiler.is_compiling() or library() is None:
        return False  # a compiler fuses the reference form itself
    return x.device.type == "cpu" and x.dtype in native.ELEMENTS and all(width % LANES == 0 for width in widths)


def mix_tokens(
    x: Tensor,
    previous: Tensor,
    mix: Tensor,
    low: Tensor | None = None,
    up: Tensor | None = None,
    *,
    document_start: Tensor | None = None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """See `reference.mix_tokens`."""
    if x.dtype == torch.float32 and dtype in native.ELEMENTS and x.numel() and can_fuse(x, x.shape[-1]):
        outputs: tuple[Tensor, ...] = native.MixTokens.apply(x, previous, mix, low, up, document_start, dtype)
        return outputs
    return reference.mix_tokens(x, previous, mix, low, up, document_start=document_start, dtype=dtype)


def gated_norm(y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `reference.gated_norm`."""
    is_supported = dtype in native.ELEMENTS and (gate is None or gate.dtype == dtype) and y.dtype == torch.float32
    if is_supported and y.numel() and can_fuse(y, y.shape[-1]):
        out: Tensor = native.GatedNorm.apply(y, gate, weight, bias, eps, dtype)
        return out
    return reference.gated_norm(y, gate, weight, bias, eps, dtype)


def squared_relu(x: Tensor) -> Tensor:
    """See `reference.squared_relu`."""
    if can_fuse(x, x.numel()):
        out: Tensor = native.SquaredRelu.apply(x)
        return out
    return reference.squared_relu(x)


def gated_value(r: Tensor, v: Tensor) -> Tensor:
    """See `reference.gated_value`."""
    if r.dtype == v.dtype and can_fuse(r, r.numel()):
        out: Tensor = native.GatedValue.apply(r, v)
        return out
    return reference.gated_value(r, v)


def wkv_with_decay(
    r: Tensor, k: Tensor, v: Tensor, x: Tensor, base: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.wkv_with_decay`."""
    is_supported = x.dtype == torch.float32 and x.numel() > 0 and preferred() in (None, "native")
    if is_supported and can_fuse(x, x.shape[2] * x.shape[3]):
        y: Tensor
        y, state = native.WkvWithDecay.apply(r, k, v, x, base, u, state)
        return y, state
    return reference.wkv_with_decay(r, k, v, x, base, u, state)


def cross_entropy_(logits: Tensor, targets: Tensor, pull: float) -> Tensor:
    """See `reference.cross_entropy_`."""
    if can_fuse(logits) and logits.numel():
        return native.cross_entropy_(logits, targets, pull)
    return reference.cross_entropy_(logits, targets, pull)
