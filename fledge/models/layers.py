"""Layers that all families share, with the precision policy in one place.

The residual stream, norms, mixes, decay and state are float32, for any dtype of the matrices. A `Linear` casts its
input to the dtype of its weight (or to `compute_dtype`, which training in bf16 sets while the weights stay float32).
For inference on a CPU its weight can be packed (`pack_linears`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fledge.core.errors import UsageError
from fledge.kernels import pack, packed_linear, why_not_packable
from fledge.kernels.fused import gated_norm, gated_value, squared_relu


class Linear(nn.Module):
    """y = x W^T without bias; weight (out, in) as in official checkpoints.

    x has any float dtype. y has the dtype of the product, because most consumers would cast it anyway.
    """

    def __init__(self, n_in: int, n_out: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, device=device))
        self.compute_dtype: torch.dtype | None = None
        self.packed: Tensor | None = None  # replaces `weight` after `pack`

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the product."""
        if self.packed is not None:
            return self.packed.dtype
        return self.compute_dtype or self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            if x.requires_grad:
                raise UsageError(
                    "this model is packed for inference and cannot compute gradients; load it with pack=False"
                )
            return packed_linear(x.to(self.dtype), self.packed)
        return nn.functional.linear(x.to(self.dtype), self.weight.to(self.dtype))

    def pack(self) -> None:
        """Replace the weight by a copy in oneDNN's layout, for inference only: no gradient, not in the state_dict."""
        self.packed = pack(self.weight)
        self.register_parameter("weight", None)


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Set the dtype of all matrix products of a model, independent of its weights; None: the dtype of the weights."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.compute_dtype = dtype


# Entries. A smaller matrix fits in the processor's cache, and the overhead of a packed product exceeds its gain.
WORTH_PACKING = 1 << 18


def pack_linears(model: nn.Module, release: Callable[[Tensor], None] | None = None) -> str | None:
    """Pack the large matrices of a model for inference on a CPU. Returns None, or the reason why it did not.

    release: called with each plain weight after packing, so that its memory can be freed immediately.
    """
    linears = [module for module in model.modules() if isinstance(module, Linear) and module.packed is None]
    linears = [linear for linear in linears if linear.weight.numel() >= WORTH_PACKING]
    for linear in linears:
        if linear.weight.device.type != "cpu":
            return f"the weights are on {linear.weight.device}"
        if reason := why_not_packable(linear.weight.dtype):
            return reason
    model.requires_grad_(False)
    for linear in linears:
        weight = linear.weight
        linear.pack()
        if release:
            release(weight)
    return None


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with weight and bias, in float32."""

    def __init__(self, width: int, eps: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device))
        self.bias = nn.Parameter(torch.zeros(width, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps)


class HeadNorm(nn.Module):
    """GroupNorm with one group for each head: (B, T, H, V) -> (B, T, H V) of `dtype`, times silu(gate) if given.

    The official eps is 64e-5. The official training code divides by 8 before a norm with 1e-5, which is the same
    function.
    """

    def __init__(self, n_head: int, width: int, eps: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.n_head = n_head
        self.weight = nn.Parameter(torch.ones(width, device=device))
        self.bias = nn.Parameter(torch.zeros(width, device=device))
        self.eps = eps

    def forward(self, y: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        return gated_norm(y, gate, self.weight.float(), self.bias.float(), self.eps, dtype)


def vector(width: int, device: torch.device | str | None = None) -> nn.Parameter:
    """A per-channel parameter in the official shape (1, 1, C)."""
    return nn.Parameter(torch.empty(1, 1, width, device=device))


def token_shift(x: Tensor, previous: Tensor) -> Tensor:
    """The input one token earlier: (B, T, C) and the last token before it (B, C) -> (B, T, C)."""
    if x.shape[1] == 1:
        return previous[:, None]
    return torch.cat((previous[:, None], x[:, :-1]), dim=1)


def last_token(x: Tensor, previous: Tensor, lengths: Tensor | None) -> Tensor:
    """The input for the next call's token shift: token lengths[b] - 1 of each row of x (B, T, C), or `previous`."""
    if lengths is None:
        return x[:, -1] if x.shape[1] else previous
    seen = torch.cat((previous[:, None], x), dim=1)  # (B, T + 1, C)
    return seen[torch.arange(x.shape[0], device=x.device), lengths]


def own_value(r: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """The output of the recurrence for a token without earlier tokens: (r . (u * k)) v, (B, T, H, V)."""
    return (r * u * k).sum(-1, keepdim=True) * v


def channel_mix(key: Linear, value: Linear, receptance: Linear, xk: Tensor, xr: Tensor) -> Tensor:
    """sigmoid(R xr) * V relu(K xk)^2, the same in every version (paper, equations 10-13)."""
    hidden = squared_relu(key(xk))  # (B, T, F)
    return gated_value(receptance(xr), value(hidden))
