"""A Llama-shaped transformer, the baseline that RWKV is compared with: trained, run and saved like the other models.

symbol         shape     parameter
W_q, k, v, o   (A, C)    att.{query,key,value,output}.weight; output is (C, A)
W_1, W_3       (F, C)    ffn.gate.weight, ffn.key.weight; W_2 (C, F) is ffn.value.weight
RMSNorm        (C)       ln1.weight, ln2.weight, ln_out.weight

C = n_embd, A = dim_att = H N, F = dim_ffn; B batch, T time, S places in the state. No biases, no dropout, the head is
not tied to the embedding. Rotary positions with base 10000 turn channel n of a head together with channel n + N/2.

Precision is that of every model: stream, norms, rotation and state are float32. Attention is computed in the dtype of
the matrix products around it, which is what fast kernels for it need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fledge.models.base import BaseModel, Readout, TokenMask
from fledge.models.config import ModelConfig
from fledge.models.layers import Linear
from fledge.models.state import KvState, State

ROTARY_BASE = 10000.0


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, times a weight, in float32."""

    def __init__(self, width: int, eps: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


@dataclass(frozen=True)
class AttentionWindow:
    """What the tokens of one call see and where they go, the same in every layer. Columns: S of the state, then T."""

    cos: Tensor  # (B or 1, T, 1, N/2)
    sin: Tensor
    mask: Tensor | None  # (B or 1, 1, T, S + T) bool, True where seen; None: see `causal`
    causal: bool  # without a mask: True where there is no state and each token sees all up to itself, False: everything
    kept: Tensor | None  # (B, S') the columns that the new state keeps; None: all
    filled: Tensor | None  # (B, S', 1, 1) bool: which of these hold a token, and no padding
    begin: Tensor  # (1, B) of the new state
    end: Tensor  # (1, B) of the new state

    @staticmethod
    def of(state: KvState, length: int, layout: TokenMask, head_size: int) -> AttentionWindow:
        """For `length` new tokens after `state`."""
        begin, end, places = state.begin[0], state.end[0], state.places
        B, device = begin.shape[0], begin.device
        fresh = None if layout.fresh is None else layout.fresh[:, :, 0]  # (B, T)
        if fresh is not None and not bool(fresh.any()):
            fresh = None
        steps = torch.arange(length, device=device)
        cos, sin = _rotation(end[:, None] + steps if places else steps[None], head_size)
        # Whether every row fills its places from the first to the last.
        even = places == 0 or bool(((begin == 0) & (end == places)).all())
        if even and fresh is None and (places == 0 or length == 1):
            mask = None
        else:
            mask = _mask(begin, end, places, steps, fresh)
        read = torch.full_like(end, length) if layout.lengths is None else layout.lengths
        if fresh is not None:
            last = torch.where(fresh, steps + 1, 0).amax(1) - 1 if length else torch.full_like(end, -1)
            begin = torch.where(last >= 0, end + last, begin)
        kept = filled = None
        if layout.lengths is not None or not even:
            longest = int((end + read).max()) if B else 0
            place = torch.arange(longest, device=device).expand(B, longest)
            kept = torch.where(place < end[:, None], place, places + place - end[:, None])
            filled = place < (end + read)[:, None]
            kept, filled = kept.where(filled, 0), filled[:, :, None, None]
        return AttentionWindow(cos, sin, mask, places == 0, kept, filled, begin[None], (end + read)[None])

    def keep(self, columns: Tensor) -> Tensor:
        """What the new state keeps of keys or values (B, S + T, H, N): (B, S', H, N)."""
        if self.kept is None or self.filled is None:
            return columns
        index = self.kept[:, :, None, None].expand(-1, -1, *columns.shape[2:])
        return columns.gather(1, index).masked_fill(~self.filled, 0.0) if columns.shape[1] else columns


def _mask(begin: Tensor, end: Tensor, places: int, steps: Tensor, fresh: Tensor | None) -> Tensor:
    """(B, 1, T, S + T): the tokens of the same document up to each one. Padding sees itself, and so is never nan."""
    B, T = begin.shape[0], steps.shape[0]
    place = torch.arange(places, device=begin.device)
    before = ((place >= begin[:, None]) & (place < end[:, None]))[:, None].expand(B, T, places)
    now = (steps <= steps[:, None]).expand(B, T, T)
    if fresh is not None:
        document = fresh.cumsum(1)  # (B, T): 0 as long as the document of the state goes on
        before = before & (document == 0)[:, :, None]
        now = now & (document[:, :, None] == document[:, None])
    return torch.cat((before, now), dim=2)[:, None]


def _rotation(positions: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at `positions` (B, T): (B, T, 1, N/2)."""
    pairs = torch.arange(0, head_size, 2, device=positions.device).float()
    angles = positions[:, :, None, None].float() * ROTARY_BASE ** (-pairs / head_size)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, N) turned by its positions, in float32."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Every token reads the values of the tokens it sees, weighted by how its query meets their keys."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        C, A = config.n_embd, config.dim_att
        self.n_head, self.head_size = config.n_head, config.head_size
        self.query = Linear(C, A, device)
        self.key = Linear(C, A, device)
        self.value = Linear(C, A, device)
        self.output = Linear(A, C, device)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, view: AttentionWindow) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), keys and values of the state (B, S, H, N) -> output (B, T, C), new keys and values."""
        B, T, _ = x.shape
        heads = (B, T, self.n_head, self.head_size)
        q = rotate(self.query(x).view(heads), view.cos, view.sin)
        k = rotate(self.key(x).view(heads), view.cos, view.sin)
        v = self.value(x).view(heads)
        if keys.shape[1]:
            k, v = torch.cat((keys, k), 1), torch.cat((values, v), 1)  # (B, S + T, H, N)
        y = self._read(q, k, v, view) if q.numel() else q
        return self.output(y.reshape(B, T, self.n_head * self.head_size)), view.keep(k), view.keep(v)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, view: AttentionWindow) -> Tensor:
        weight = self.key.weight if self.key.packed is None else self.key.packed
        dtype = self.key.compute_dtype or weight.dtype
        q, k, v = (tensor.to(dtype).transpose(1, 2) for tensor in (q, k, v))  # (B, H, T or S + T, N)
        causal = view.mask is None and view.causal
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=view.mask, is_causal=causal)
        return y.transpose(1, 2).float()


class SwiGlu(nn.Module):
    """W_2 (silu(W_1 x) * W_3 x)."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.gate = Linear(config.n_embd, config.dim_ffn, device)
        self.key = Linear(config.n_embd, config.dim_ffn, device)
        self.value = Linear(config.dim_ffn, config.n_embd, device)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.value(nn.functional.silu(self.gate(x)) * self.key(x))


class Block(nn.Module):
    """x += Attention(ln1(x)); x += SwiGlu(ln2(x))."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.ln1 = RMSNorm(config.n_embd, config.norm_eps, device)
        self.ln2 = RMSNorm(config.n_embd, config.norm_eps, device)
        self.att = Attention(config, device)
        self.ffn = SwiGlu(config, device)

    def forward(
        self, x: Tensor, state: KvState, layer: int, view: AttentionWindow
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, C) and the whole model's state -> x after this block, and this layer's new keys and values."""
        out, keys, values = self.att(self.ln1(x), state.keys[layer], state.values[layer], view)
        x = x + out
        return x + self.ffn(self.ln2(x)), (keys, values)


class Transformer(BaseModel):
    """The whole model, with the forward of `BaseModel`; its state grows with the text."""

    block_class = Block
    state_class = KvState

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__(config, device)
        self.add_module("ln_out", RMSNorm(config.n_embd, config.norm_eps, device))  # in place of the LayerNorm

    def forward(
        self,
        idx: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        last: bool = False,
        fresh: Tensor | None = None,
        readout: Readout | None = None,
    ) -> tuple[Tensor, State]:
        """As `BaseModel.forward`. fresh: (B, T) bool, True where a document begins: nothing before it is seen.

        Positions go on counting over the beginning of a document; only the distances of tokens matter to attention.
        """
        self._check(idx, state, last)
        layout = TokenMask.of(lengths, fresh, idx)
        before = cast(KvState, self.initial_state(idx.shape[0]) if state is None else state)
        view = AttentionWindow.of(before, idx.shape[1], layout, self.config.head_size)
        x = self.emb(idx).float()  # (B, T, C)
        layers: list[tuple[Tensor, Tensor]] = []
        for number, block in enumerate(self.blocks):
            x, after = cast(Any, block)(x, before, number, view)
            layers.append(after)
        keys, values = (torch.stack(tensors) for tensors in zip(*layers, strict=True))  # (L, B, S', H, N)
        return self._read_out(x, layout, last, readout), KvState(keys, values, view.begin, view.end)
