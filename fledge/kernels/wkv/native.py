"""WKV of RWKV-5 Eagle and RWKV-6 Finch in the native library, with its gradient, for training on a CPU.

The loop runs in vector instructions (native/isa/recurrence.h). The gradient recomputes the states from the beginnings
of segments (native/isa/gradient.h), so only the inputs are saved for it. Both are exact for every decay. They are
registered as torch operators, so torch.compile knows their shapes and gradient without tracing the library.
"""

from __future__ import annotations

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor

from fledge.kernels.native_ops import check_memory, follow_torch_threads, functions, wkv_native


def wkv_differentiable(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The native form of `wkv_reference`, for float32 on the CPU; differentiable in all six inputs."""
    inputs = (r, k, v, w, u, state)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        y: Tensor
        y, state = _wkv(*inputs)
        return y, state
    return wkv_native(*inputs)


@torch.library.custom_op("fledge::wkv_native", mutates_args=())
def _wkv(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return wkv_native(r, k, v, w, u, state)


@torch.library.custom_op("fledge::wkv_native_gradient", mutates_args=())
def _gradient(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, dy: Tensor, dafter: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all six inputs from those of y and the new state."""
    return wkv_gradient(r, k, v, torch.exp(w), u, state, dy, dafter)


def wkv_gradient(
    r: Tensor, k: Tensor, v: Tensor, decay: Tensor, u: Tensor, state: Tensor, dy: Tensor, dafter: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of r, k, v, the log of the decay, u and state from those of y and the new state; all float32."""
    r, k, v, decay, u, state, dy, dafter = (x.contiguous() for x in (r, k, v, decay, u, state, dy, dafter))
    dr, dk, dw, dv, dstate = (torch.empty_like(x) for x in (r, k, decay, v, state))
    du = u.new_empty(r.shape[0], *u.shape)  # (B, H, K)
    sizes = (c_int64 * 5)(*r.shape, v.shape[-1])
    tensors = (r, k, v, decay, u, state, dy, dafter, dr, dk, dv, dw, du, dstate)
    follow_torch_threads()
    failed = functions().fledge_wkv_gradient(sizes, *(x.data_ptr() for x in tensors))
    check_memory(failed, f"the gradient of {r.shape[1]} tokens in one call")
    return dr, dk, dv, dw, du.sum(0), dstate


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)


@_wkv.register_fake
def _(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    return _empty_like(v, state)


@_gradient.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, dy: Tensor, dafter: Tensor
) -> tuple[Tensor, ...]:
    return _empty_like(r, k, v, w, u, state)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor, dafter: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _gradient(*ctx.saved_tensors, dy, dafter)
    return gradients


_wkv.register_autograd(_backward, setup_context=_save_inputs)
