"""WKV of RWKV-4, one token at a time: a weighted mean of values, weights exp(k) with a decay per channel.

    y_t = (a + exp(u + k_t) v_t) / (b + exp(u + k_t))
    a, b <- exp(w) a + exp(k_t) v_t, exp(w) b + exp(k_t)

a and b are stored divided by exp(p), with the largest exponent so far as p, so that nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

State4 = tuple[Tensor, Tensor, Tensor]

# A real denominator is near 1 or above. It is 0 only at padding of a row that has read nothing, where the output must
# still be finite.
TINY = 1e-30


def wkv4_reference(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State4) -> tuple[Tensor, State4]:
    """k, v, w: (B, T, A), w <= 0 the log of the decay; u: (A); state: aa, bb, pp, each (B, A).

    Returns y (B, T, A) and the state after the last token.
    """
    aa, bb, pp = state
    outputs = []
    for t in range(k.shape[1]):
        bonus = u + k[:, t]
        top = torch.maximum(pp, bonus)
        past, now = torch.exp(pp - top), torch.exp(bonus - top)
        outputs.append((past * aa + now * v[:, t]) / (past * bb + now).clamp_min(TINY))
        kept = pp + w[:, t]
        top = torch.maximum(kept, k[:, t])
        past, now = torch.exp(kept - top), torch.exp(k[:, t] - top)
        aa, bb, pp = past * aa + now * v[:, t], past * bb + now, top
    if not outputs:
        return v.new_zeros(v.shape), state
    return torch.stack(outputs, dim=1), (aa, bb, pp)
