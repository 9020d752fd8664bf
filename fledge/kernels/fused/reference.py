"""The specification of the fused operations, in plain torch with its own gradients.

All arithmetic is float32. Results that a matrix product reads have the dtype of that product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fledge.kernels.dispatch import wkv


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
    """Each token mixed with the previous one, n times (paper, equations 3-4 and 14-16).

    x: (B, T, C) float32; previous: (B, C), the input before the first token; mix: (n, C), the weights of the previous
    token; low (n, B T, M) and up (n, M, C): their product is added to the weights; document_start: (B, T, 1) bool,
    tokens whose previous input is zero. Returns n tensors (B, T, C) of `dtype`.
    """
    shifted = previous[:, None] if x.shape[1] == 1 else torch.cat((previous[:, None], x[:, :-1]), dim=1)
    if document_start is not None:
        shifted = shifted.masked_fill(document_start, 0.0)
    weights = mix[:, None, None]  # (n, 1, 1, C)
    if low is not None and up is not None:
        weights = weights + (low @ up).view(len(mix), *x.shape)  # (n, B, T, C)
    return torch.addcmul(x, shifted - x, weights).to(dtype).unbind(0)


def gated_norm(y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """silu(gate) * (weight * normalize(y) + bias), normalized over each head (equations 7 and 20).

    y: (B, T, H, V) float32; gate: (B, T, H V) or None; weight, bias: (H V). Returns (B, T, H V) of `dtype`.
    """
    batch, length, heads, width = y.shape
    normed = torch.nn.functional.layer_norm(y, (width,), eps=eps).view(batch, length, heads * width)
    out = normed * weight + bias
    return (out if gate is None else out * torch.nn.functional.silu(gate.float())).to(dtype)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 in the dtype of x, of any shape."""
    return torch.relu(x.float()).square().to(x.dtype)


def gated_value(r: Tensor, v: Tensor) -> Tensor:
    """sigmoid(r) * v in float32; r and v have the same shape."""
    return torch.sigmoid(r.float()) * v.float()


def wkv_with_decay(
    r: Tensor, k: Tensor, v: Tensor, x: Tensor, base: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`wkv` with the log decay w = -exp(base + x); x: (B, T, H, K) float32, base: (H K).

    r, k and v may have any float dtype and are converted to that of x.
    """
    w = -torch.exp(x + base.view(x.shape[2:]))
    return wkv(r.to(x.dtype), k.to(x.dtype), v.to(x.dtype), w, u, state)


def cross_entropy_(logits: Tensor, targets: Tensor, pull: float) -> Tensor:
    """The losses of logits (M, vocab) with targets (M,) in nats, (M,); overwrites the logits with their gradient.

    The gradient of the largest logit of each row grows by `pull` times the logit.
    """
    powers = logits.float()
    largest, position = powers.max(-1, keepdim=True)
    target_logit = powers.gather(-1, targets[:, None]) - largest
    powers = (powers - largest).exp_()
    total = powers.sum(-1, keepdim=True)
    powers.div_(total)
    powers.scatter_add_(-1, targets[:, None], powers.new_full((len(targets), 1), -1.0))
    powers.scatter_add_(-1, position, largest * pull)
    logits.copy_(powers)
    return (total.log() - target_logit).squeeze(-1)
