"""WKV of RWKV-5 Eagle and RWKV-6 Finch in the native library, with its gradient: for training on a CPU.

The loop itself, in vector instructions (native/isa/recurrence.h), and a gradient that computes the states again from
the beginnings of segments (native/isa/gradient.h). Exact for every decay. Saved for the gradient: the inputs alone.
Not here: finding the library, and the recurrence without a gradient (fledge.kernels.native).
"""

from __future__ import annotations

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fledge.kernels.native import enough_memory, follow_torch_threads, functions, wkv_native


def wkv_trained(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `wkv_reference`, for float32 on the CPU; differentiable in all six."""
    inputs = (r, k, v, w, u, state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        y: Tensor
        y, state = _Native.apply(*inputs)
        return y, state
    return wkv_native(*inputs)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(r, k, v, w, u, state)
        return wkv_native(r, k, v, w, u, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        r, k, v, w, u, state = (x.contiguous() for x in ctx.saved_tensors)
        dy, dafter = (gradient.contiguous() for gradient in gradients)
        decay = torch.exp(w)
        dr, dk, dw, dv, dstate = (torch.empty_like(x) for x in (r, k, w, v, state))
        du = torch.empty(r.shape[0], *u.shape)  # (B, H, K)
        sizes = (c_int64 * 5)(*r.shape, v.shape[-1])
        tensors = (r, k, v, decay, u, state, dy, dafter, dr, dk, dv, dw, du, dstate)
        follow_torch_threads()
        failed = functions().fledge_wkv_gradient(sizes, *(x.data_ptr() for x in tensors))
        enough_memory(failed, f"the gradient of {r.shape[1]} tokens at once")
        return dr, dk, dv, dw, du.sum(0), dstate
