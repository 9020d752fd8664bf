"""A transformer with the architecture of Llama, the baseline for comparisons.

symbol         shape     parameter
W_q, k, v, o   (A, C)    att.{query,key,value,output}.weight; output is (C, A)
W_1, W_3       (F, C)    ffn.gate.weight, ffn.key.weight; W_2 (C, F) is ffn.value.weight
RMSNorm        (C)       ln1.weight, ln2.weight, ln_out.weight

C = n_embd, A = dim_att = H N, F = dim_ffn; B batch, T time, S tokens in the state. There are no biases and no dropout,
and the head is not tied to the embedding. Rotary positions with base 10000 rotate channel n of a head together with
channel n + N/2.

The residual stream, norms, rotation and state are float32. Attention is computed in the dtype of the matrix products,
because fast attention kernels need it.
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
    """What the tokens of one call attend to, the same in every layer. Columns: S of the state, then T new ones."""

    cos: Tensor  # (B or 1, T, 1, N/2)
    sin: Tensor
    mask: Tensor | None  # (B or 1, 1, T, S + T) bool, True where attended; None: see `causal`
    causal: bool  # without a mask: True: no state, causal attention; False: full attention
    state_columns: Tensor | None  # (B, S') the columns that the new state keeps; None: all
    is_token: Tensor | None  # (B, S', 1, 1) bool: whether such a column is a token, not padding
    begin: Tensor  # (1, B) of the new state
    end: Tensor  # (1, B) of the new state

    @staticmethod
    def create(state: KvState, length: int, token_mask: TokenMask, head_size: int) -> AttentionWindow:
        """The window of `length` new tokens after `state`."""
        begin, end, capacity = state.begin[0], state.end[0], state.capacity
        B, device = begin.shape[0], begin.device
        starts = None if token_mask.document_start is None else token_mask.document_start[:, :, 0]  # (B, T)
        if starts is not None and not bool(starts.any()):
            starts = None
        steps = torch.arange(length, device=device)
        cos, sin = _compute_rotation(end[:, None] + steps if capacity else steps[None], head_size)
        # Whether every sequence uses the full capacity.
        is_full = capacity == 0 or bool(((begin == 0) & (end == capacity)).all())
        if is_full and starts is None and (capacity == 0 or length == 1):
            mask = None
        else:
            mask = _build_mask(begin, end, capacity, steps, starts)
        lengths = torch.full_like(end, length) if token_mask.lengths is None else token_mask.lengths
        if starts is not None:
            last = torch.where(starts, steps + 1, 0).amax(1) - 1 if length else torch.full_like(end, -1)
            begin = torch.where(last >= 0, end + last, begin)
        state_columns = is_token = None
        if token_mask.lengths is not None or not is_full:
            longest = int((end + lengths).max()) if B else 0
            position = torch.arange(longest, device=device).expand(B, longest)
            state_columns = torch.where(position < end[:, None], position, capacity + position - end[:, None])
            is_token = position < (end + lengths)[:, None]
            state_columns, is_token = state_columns.where(is_token, 0), is_token[:, :, None, None]
        return AttentionWindow(
            cos, sin, mask, capacity == 0, state_columns, is_token, begin[None], (end + lengths)[None]
        )

    def keep(self, columns: Tensor) -> Tensor:
        """The part of keys or values that the new state keeps (B, S + T, H, N): (B, S', H, N)."""
        if self.state_columns is None or self.is_token is None:
            return columns
        index = self.state_columns[:, :, None, None].expand(-1, -1, *columns.shape[2:])
        return columns.gather(1, index).masked_fill(~self.is_token, 0.0) if columns.shape[1] else columns


def _build_mask(begin: Tensor, end: Tensor, capacity: int, steps: Tensor, starts: Tensor | None) -> Tensor:
    """(B, 1, T, S + T): True for the tokens of the same document up to each token.

    Padding attends to itself, so its output is never nan.
    """
    B, T = begin.shape[0], steps.shape[0]
    position = torch.arange(capacity, device=begin.device)
    to_state = ((position >= begin[:, None]) & (position < end[:, None]))[:, None].expand(B, T, capacity)
    to_call = (steps <= steps[:, None]).expand(B, T, T)
    if starts is not None:
        document = starts.cumsum(1)  # (B, T): 0 while the document of the state continues
        to_state = to_state & (document == 0)[:, :, None]
        to_call = to_call & (document[:, :, None] == document[:, None])
    return torch.cat((to_state, to_call), dim=2)[:, None]


def _compute_rotation(positions: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """The cos and sin of the angles at `positions` (B, T), both (B, T, 1, N/2)."""
    pairs = torch.arange(0, head_size, 2, device=positions.device).float()
    angles = positions[:, :, None, None].float() * ROTARY_BASE ** (-pairs / head_size)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, N) rotated by its positions, in float32."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Scaled dot-product attention with rotary positions."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        C, A = config.n_embd, config.dim_att
        self.n_head, self.head_size = config.n_head, config.head_size
        self.query = Linear(C, A, device)
        self.key = Linear(C, A, device)
        self.value = Linear(C, A, device)
        self.output = Linear(A, C, device)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, window: AttentionWindow
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), keys and values of the state (B, S, H, N) -> output (B, T, C), new keys and values."""
        B, T, _ = x.shape
        heads = (B, T, self.n_head, self.head_size)
        q = rotate(self.query(x).float().view(heads), window.cos, window.sin)
        k = rotate(self.key(x).float().view(heads), window.cos, window.sin)
        v = self.value(x).float().view(heads)
        if keys.shape[1]:
            k, v = torch.cat((keys, k), 1), torch.cat((values, v), 1)  # (B, S + T, H, N)
        y = self._attend(q, k, v, window) if q.numel() else q
        return self.output(y.reshape(B, T, self.n_head * self.head_size)), window.keep(k), window.keep(v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: AttentionWindow) -> Tensor:
        dtype = self.key.dtype
        q, k, v = (tensor.to(dtype).transpose(1, 2) for tensor in (q, k, v))  # (B, H, T or S + T, N)
        causal = window.mask is None and window.causal
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=window.mask, is_causal=causal)
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
        return self.value(nn.functional.silu(self.gate(x).float()) * self.key(x))


class Block(nn.Module):
    """x += Attention(ln1(x)); x += SwiGlu(ln2(x))."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.ln1 = RMSNorm(config.n_embd, config.norm_eps, device)
        self.ln2 = RMSNorm(config.n_embd, config.norm_eps, device)
        self.att = Attention(config, device)
        self.ffn = SwiGlu(config, device)

    def forward(
        self, x: Tensor, state: KvState, layer: int, window: AttentionWindow
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, C) and the whole model's state -> x after this block, and this layer's new keys and values."""
        out, keys, values = self.att(self.ln1(x), state.keys[layer], state.values[layer], window)
        x = x + out
        return x + self.ffn(self.ln2(x)), (keys, values)


class Transformer(BaseModel):
    """The whole model, with the interface of `BaseModel`. Its state grows with the text."""

    block_class = Block
    state_class = KvState

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__(config, device)
        self.add_module("ln_out", RMSNorm(config.n_embd, config.norm_eps, device))  # replaces the LayerNorm

    def forward(
        self,
        idx: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        last: bool = False,
        document_start: Tensor | None = None,
        readout: Readout | None = None,
    ) -> tuple[Tensor, State]:
        """The interface of `BaseModel.forward`. document_start masks all tokens of earlier documents.

        Positions continue across document boundaries; attention depends only on the distances between tokens.
        """
        self._check(idx, state, last)
        mask = TokenMask.create(lengths, document_start, idx)
        before = cast(KvState, self.initial_state(idx.shape[0]) if state is None else state)
        window = AttentionWindow.create(before, idx.shape[1], mask, self.config.head_size)
        x = self.emb(idx).float()  # (B, T, C)
        layers: list[tuple[Tensor, Tensor]] = []
        for number, block in enumerate(self.blocks):
            x, after = cast(Any, block)(x, before, number, window)
            layers.append(after)
        keys, values = (torch.stack(tensors) for tensors in zip(*layers, strict=True))  # (L, B, S', H, N)
        return self._compute_logits(x, mask, last, readout), KvState(keys, values, window.begin, window.end)
