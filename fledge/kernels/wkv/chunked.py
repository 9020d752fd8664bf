"""WKV in parallel over time, in plain torch, exact for every decay from 0 to 1.

The sequence is split into chunks of c = 2^p tokens. A token reads earlier chunks through the state at the start of its
own chunk, and earlier tokens of its own chunk directly. The factor of the pair (t, i), i < t, is

    exp(w_{i+1} + ... + w_{t-1})

As a quotient of two cumulative products, this overflows if one decay is small. Other implementations therefore clamp
the decay. This one never forms a quotient. It splits the chunk into halves at a boundary. For a token of the later half
and one of the earlier half, the exponent is the sum of two partial sums,

    prefix_t = sum of w from the boundary to t-1        (later half)
    suffix_i = sum of w from i+1 to the boundary        (earlier half)

Both are <= 0, so both factors are in [0, 1] and nothing can overflow. A factor that underflows belongs to a product
that is even smaller. This is one matrix product for the boundary. The two halves are then split in the same way, down
to pairs of neighbors, in log2(c) levels of boundaries. The partial sums of a block are those of its halves plus terms
of equal sign, so no digits cancel.

The gradient is written by hand, boundary by boundary in the opposite order: automatic differentiation takes twice the
time and several times the memory. It needs the inputs and the states at the chunk boundaries. Both are torch operators
that torch.compile does not trace: tracing the boundaries would take minutes.

Cost per token and head: log2(c) K exponentials, c (K + V) / 2 multiply-adds inside the chunk, 2 K V for the state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # tokens; near the head size, which balances the work inside a chunk and the work on the state


def wkv_chunked(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The same function as `wkv_reference`, with the same arguments and results; differentiable in all six.

    `chunk` must be a power of two.
    """
    assert chunk & (chunk - 1) == 0, "chunk must be a power of two"
    length = r.shape[1]
    if length == 0:
        return v.new_zeros(v.shape), state
    chunk = min(chunk, 1 << (length - 1).bit_length())
    y: Tensor
    y, state, _ = _chunks(*(_to_chunks(x, chunk) for x in (r, k, v, w)), u, state)
    return y.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def _to_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, T, H, N) -> (B, H, n, c, N). The end is padded with zeros: k = 0 writes nothing, w = 0 forgets nothing."""
    batch, length, heads, width = x.shape
    padding = -length % chunk
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding))
    return x.reshape(batch, (length + padding) // chunk, chunk, heads, width).permute(0, 3, 1, 2, 4).contiguous()


class _Boundaries(NamedTuple):
    """The sums of log decays on both sides of all boundaries between blocks of `size` tokens; G: their number."""

    size: int
    prefix: Tensor  # (G, size, K): from the boundary to before each token of the later half
    suffix: Tensor  # (G, size, K): from after each token of the earlier half to the boundary


class _DecaySums(NamedTuple):
    """Sums of log decays of whole chunks, and of the blocks on both sides of each boundary inside them."""

    levels: list[_Boundaries]  # from the smallest blocks to the largest
    prefix: Tensor  # (B, H, n, c, K): from the start of the chunk to before each token
    suffix: Tensor  # (B, H, n, c, K): from after each token to the end of the chunk
    total: Tensor  # (B, H, n, 1, K)


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Views of the earlier and the later half of every block of 2 size rows: (..., c, N) -> two of (G, size, N)."""
    pairs = x.view(x.numel() // (2 * size * x.shape[-1]), 2, size, x.shape[-1])
    return pairs[:, 0], pairs[:, 1]


def _sum_decays(w: Tensor) -> _DecaySums:
    """All partial sums, from pairs of neighbors up to the whole chunk."""
    prefix, suffix = torch.zeros_like(w), torch.zeros_like(w)
    total = w.flatten(0, 3)[:, None]  # (blocks, 1, K)
    levels = []
    size = 1
    while size < w.shape[-2]:
        earlier, later = total[0::2], total[1::2]
        prefix_later, suffix_earlier = _halves(prefix, size)[1], _halves(suffix, size)[0]
        levels.append(_Boundaries(size, prefix_later.clone(), suffix_earlier.clone()))
        prefix_later += earlier
        suffix_earlier += later
        total = earlier + later
        size *= 2
    return _DecaySums(levels, prefix, suffix, total.view(*w.shape[:3], 1, w.shape[-1]))


@torch.library.custom_op("fledge::wkv_chunks", mutates_args=())
def _chunks(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r, k, w (B, H, n, c, K), v (B, H, n, c, V), u (H, K), state (B, H, K, V) -> y (B, H, n, c, V), final state, and
    the states before each chunk (B, H, n, K, V), which the gradient needs.
    """
    sums = _sum_decays(w)
    # The token itself: weight r_t . (u * k_t), no decay.
    y = (r * k * u[:, None, None, :]).sum(-1, keepdim=True) * v
    # Tokens of the same chunk.
    for size, prefix, suffix in sums.levels:
        if size == 1:  # neighbors: no decay between them
            weight = (_halves(r, 1)[1] * _halves(k, 1)[0]).sum(-1, keepdim=True)
            _halves(y, 1)[1].addcmul_(weight, _halves(v, 1)[0])
            continue
        reads = _halves(r, size)[1] * prefix.exp()  # (G, size, K)
        writes = _halves(k, size)[0] * suffix.exp()
        _halves(y, size)[1].add_(reads @ writes.transpose(-1, -2) @ _halves(v, size)[0])
    # Earlier chunks, through the state at the start of each chunk.
    added = (k * sums.suffix.exp()).transpose(-1, -2) @ v  # (B, H, n, K, V)
    kept = sums.total.exp().transpose(-1, -2)  # (B, H, n, K, 1)
    starts = []
    for number in range(added.shape[2]):
        starts.append(state)
        state = kept[:, :, number] * state + added[:, :, number]
    before = torch.stack(starts, dim=2)  # (B, H, n, K, V)
    y += (r * sums.prefix.exp()) @ before
    return y, state, before


@torch.library.custom_op("fledge::wkv_chunks_gradient", mutates_args=())
def _gradient(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, before: Tensor, dy: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all six inputs of `_chunks` from those of y and the final state."""
    sums = _sum_decays(w)
    # Earlier chunks. `after` holds the gradient of the state at the end of each chunk.
    prefix, suffix = sums.prefix.exp(), sums.suffix.exp()
    kept = sums.total.exp().transpose(-1, -2)  # (B, H, n, K, 1)
    local = (r * prefix).transpose(-1, -2) @ dy  # (B, H, n, K, V): through the reads of the same chunk
    ends = []
    for number in reversed(range(dy.shape[2])):
        ends.append(dstate)
        dstate = kept[:, :, number] * dstate + local[:, :, number]
    after = torch.stack(ends[::-1], dim=2)  # (B, H, n, K, V)
    dr = dy @ before.transpose(-1, -2) * prefix
    dk = v @ after.transpose(-1, -2) * suffix
    dv = (k * suffix) @ after
    dprefix, dsuffix = dr * r, dk * k
    dtotal = ((after * before).sum(-1, keepdim=True) * kept).transpose(-1, -2)  # (B, H, n, 1, K)

    dw = _backward_boundaries(sums.levels, (r, k, v, dy), (dr, dk, dv), (dprefix, dsuffix, dtotal))

    # The token itself.
    strength = (dy * v).sum(-1, keepdim=True)  # (B, H, n, c, 1)
    bonus = k * u[:, None, None, :]
    dr.addcmul_(strength, bonus)
    dk.addcmul_(strength, r * u[:, None, None, :])
    dv.addcmul_((r * bonus).sum(-1, keepdim=True), dy)
    du = (strength * r * k).sum((0, 2, 3))
    return dr, dk, dv, dw.view_as(w), du, dstate


@_chunks.register_fake
def _(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, number = r.shape[:3]
    return torch.empty_like(v), torch.empty_like(state), v.new_empty(batch, heads, number, *state.shape[2:])


@_gradient.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, before: Tensor, dy: Tensor, dstate: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (r, k, v, w, u, dstate))


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: None) -> tuple[Tensor, ...]:
    r, k, v, w, u, before = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    dstate = torch.zeros_like(before[:, :, 0]) if dstate is None else dstate
    gradients: tuple[Tensor, ...] = _gradient(r, k, v, w, u, before, dy, dstate)
    return gradients


_chunks.register_autograd(_backward, setup_context=_save_inputs)


def _backward_boundaries(
    levels: list[_Boundaries],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    dsums: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """From the largest blocks to the smallest: add to dr, dk, dv in place and propagate the gradient of the sums to w.

    inputs: r, k, v, dy; gradients: dr, dk, dv; dsums: the gradients of prefix, suffix (B, H, n, c, K) and total
    (B, H, n, 1, K). Returns the gradient of w.
    """
    (r, k, v, dy), (dr, dk, dv), (dprefix, dsuffix, dtotal) = inputs, gradients, dsums
    dtotal = dtotal.flatten(0, 2)  # (blocks, 1, K)
    for size, prefix, suffix in reversed(levels):
        dprefix_later, dsuffix_earlier = _halves(dprefix, size)[1], _halves(dsuffix, size)[0]
        # The sums of this block were computed from those of its halves. Propagate their gradients to the halves first.
        dearlier = dtotal + dprefix_later.sum(1, keepdim=True)
        dlater = dtotal + dsuffix_earlier.sum(1, keepdim=True)
        dtotal = torch.stack((dearlier, dlater), dim=1).flatten(0, 1)
        # Then the gradients of the reads across this boundary.
        if size == 1:
            _backward_neighbors(inputs, gradients)
            continue
        prefix, suffix = prefix.exp(), suffix.exp()
        reads = _halves(r, size)[1] * prefix
        writes = _halves(k, size)[0] * suffix
        dread, value = _halves(dy, size)[1], _halves(v, size)[0]
        weight = reads @ writes.transpose(-1, -2)  # (G, size, size)
        dweight = dread @ value.transpose(-1, -2)
        _halves(dv, size)[0].add_(weight.transpose(-1, -2) @ dread)
        dreads, dwrites = dweight @ writes, dweight.transpose(-1, -2) @ reads
        _halves(dr, size)[1].addcmul_(dreads, prefix)
        _halves(dk, size)[0].addcmul_(dwrites, suffix)
        dprefix_later += dreads * reads
        dsuffix_earlier += dwrites * writes
    return dtotal


def _backward_neighbors(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], gradients: tuple[Tensor, Tensor, Tensor]
) -> None:
    """The innermost boundaries, with empty sums on both sides: products of single rows, which need no matrix
    product."""
    (r, k, v, dy), (dr, dk, dv) = inputs, gradients
    read, write, value, dread = _halves(r, 1)[1], _halves(k, 1)[0], _halves(v, 1)[0], _halves(dy, 1)[1]
    dweight = (dread * value).sum(-1, keepdim=True)  # (G, 1, 1)
    _halves(dv, 1)[0].addcmul_((read * write).sum(-1, keepdim=True), dread)
    _halves(dr, 1)[1].addcmul_(dweight, write)
    _halves(dk, 1)[0].addcmul_(dweight, read)
