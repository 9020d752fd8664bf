"""WKV of RWKV-5 Eagle and RWKV-6 Finch as in the paper, one token at a time. This loop is the specification.

    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)        paper, equations 5 and 18
    S_t = diag(exp(w_t)) S_{t-1} + k_t^T v_t

Every other form in this folder has the same arguments and layout, and is compared with it in outputs and all gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wkv_reference(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Read and write the state token by token.

    r, k, w: (B, T, H, K), v: (B, T, H, V), u: (H, K), state: (B, H, K, V), all of one dtype; w <= 0 is the log of the
    decay. Returns y (B, T, H, V) and the state after the last token (B, H, K, V).
    """
    outputs = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]  # (B, H, K, V)
        seen = state + u[:, :, None] * kv  # for the current token, the bonus u takes the place of the decay
        outputs.append((r[:, t, :, None, :] @ seen).squeeze(-2))  # (B, H, V)
        state = torch.exp(w[:, t, :, :, None]) * state + kv
    if not outputs:
        return v.new_zeros(v.shape), state
    return torch.stack(outputs, dim=1), state
