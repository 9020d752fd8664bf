"""WKV of RWKV-4 in parallel within chunks, in plain torch.

Inside a chunk every pair (t, i) has the exponent k_i + w_{i+1} + ... + w_{t-1}; the exponent of the state at token t is
p + w_1 + ... + w_{t-1}. The largest exponent of a row is subtracted before exp, so nothing overflows. The state has one
number for each channel, so matrix products gain nothing, and chunks are short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fledge.kernels.wkv4.reference import TINY, State4

CHUNK = 32  # tokens; one chunk needs c^2 A floats for each sequence
NEVER = -1e38  # an exponent of a weight of zero, but finite: inf - inf would be nan in the gradients


def wkv4_chunked(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State4, chunk: int = CHUNK
) -> tuple[Tensor, State4]:
    """The same function as `wkv4_reference`, with the same arguments and results; differentiable in all of them."""
    if k.shape[1] == 0:
        return v.new_zeros(v.shape), state
    outputs = []
    for k_c, v_c, w_c in zip(*(x.split(chunk, dim=1) for x in (k, v, w)), strict=True):
        y, state = _one_chunk(k_c, v_c, w_c, u, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _one_chunk(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State4) -> tuple[Tensor, State4]:
    aa, bb, pp = state
    length = k.shape[1]
    # Row t contains the exponents at token t for t < length, and at the end of the chunk for t = length.
    between = _sums_between(w)  # (B, c + 1, c, A): w_{i+1} + ... + w_{t-1}
    exponent = between + k[:, None]
    rows = torch.arange(length + 1, device=k.device)[:, None]
    columns = torch.arange(length, device=k.device)
    exponent = exponent.masked_fill((columns >= rows)[:, :, None], NEVER)
    itself = (columns == rows)[:, :, None]
    exponent = torch.where(itself, (u + k)[:, None], exponent)
    decay = torch.nn.functional.pad(w, (0, 0, 1, 0)).cumsum(1)  # (B, c + 1, A)
    carried = pp[:, None] + decay

    top = torch.maximum(exponent.amax(2), carried)  # (B, c + 1, A)
    weight = torch.exp(exponent - top[:, :, None])
    past = torch.exp(carried - top)
    numerator = past * aa[:, None] + torch.einsum("btia,bia->bta", weight, v)
    denominator = past * bb[:, None] + weight.sum(2)
    y = numerator[:, :length] / denominator[:, :length].clamp_min(TINY)
    return y, (numerator[:, length], denominator[:, length], top[:, length])


def _sums_between(w: Tensor) -> Tensor:
    """(B, c, A) -> (B, c + 1, c, A): entry (t, i) is w_{i+1} + ... + w_{t-1}, summed directly (no cancellation)."""
    length = w.shape[1]
    rows = torch.arange(length + 1, device=w.device)[:, None]
    columns = torch.arange(length, device=w.device)
    # Row t adds the term s = t - 1 if it is after i. A cumulative sum over the rows adds it to all later rows.
    shifted = torch.nn.functional.pad(w, (0, 0, 1, 0))  # row t contains w_{t-1}
    is_added = (rows - 1 > columns)[:, :, None]
    return torch.where(is_added, shifted[:, :, None], 0.0).cumsum(1)
