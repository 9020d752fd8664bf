"""RWKV-4, the baseline of the Eagle and Finch paper.

symbol        shape        parameter
1 - mu        (1, 1, C)    att.time_mix_{k,v,r}, ffn.time_mix_{k,r}: weight of the *current* token
w             (A)          att.time_decay; the log of the decay is -exp(w)
u             (A)          att.time_first; the current token enters with exp(u + k)
W_r, k, v, o  (A, C)       att.{receptance,key,value,output}.weight; output is (C, A)

C = n_embd, A = dim_att, F = dim_ffn; B batch, T time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fledge.kernels import wkv4
from fledge.models.base import BaseModel, TokenMask
from fledge.models.config import ModelConfig
from fledge.models.layers import LayerNorm, Linear, channel_mix, vector
from fledge.models.state import Rwkv4State

# The key of a padded token: its weight exp(k) is zero for any state.
PADDING_KEY = -1e38


class TimeMix(nn.Module):
    """Static token shift, then a decaying weighted mean of values behind a sigmoid gate."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        C, A = config.n_embd, config.dim_att
        self.time_mix_k = vector(C, device)
        self.time_mix_v = vector(C, device)
        self.time_mix_r = vector(C, device)
        self.time_decay = nn.Parameter(torch.empty(A, device=device))
        self.time_first = nn.Parameter(torch.empty(A, device=device))
        self.receptance = Linear(C, A, device)
        self.key = Linear(C, A, device)
        self.value = Linear(C, A, device)
        self.output = Linear(A, C, device)

    def forward(
        self, x: Tensor, shift: Tensor, state: tuple[Tensor, Tensor, Tensor], mask: TokenMask
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x (B, T, C), shift (B, C), state aa, bb, pp (B, A) -> output (B, T, C), new shift, new state."""
        mix = [1 - weight.float() for weight in (self.time_mix_k, self.time_mix_v, self.time_mix_r)]
        xk, xv, xr = mask.mix(x, shift, mix, self.key.dtype)
        r = torch.sigmoid(self.receptance(xr).float())  # (B, T, A)
        k = mask.fill_padding(self.key(xk).float(), PADDING_KEY)
        v = self.value(xv).float()
        w = mask.mask_decay(-torch.exp(self.time_decay.float()).expand_as(k))
        y, state = wkv4(k, v, w, self.time_first.float(), state)
        y = mask.replace_starts(y, lambda: v)
        return self.output(r * y), mask.last_input(x, shift), state


class ChannelMix(nn.Module):
    """Token shift with a static mix, then a squared-ReLU MLP behind a gate."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        C, F = config.n_embd, config.dim_ffn
        self.time_mix_k = vector(C, device)
        self.time_mix_r = vector(C, device)
        self.key = Linear(C, F, device)
        self.receptance = Linear(C, C, device)
        self.value = Linear(F, C, device)

    def forward(self, x: Tensor, shift: Tensor, mask: TokenMask) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) -> output (B, T, C), new shift."""
        mix = [1 - self.time_mix_k.float(), 1 - self.time_mix_r.float()]
        xk, xr = mask.mix(x, shift, mix, self.key.dtype)
        out = channel_mix(self.key, self.value, self.receptance, xk, xr)
        return out, mask.last_input(x, shift)


class Block(nn.Module):
    """x += TimeMix(ln1(x)); x += ChannelMix(ln2(x)). Block 0 also owns ln0, the norm of the embedding."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = LayerNorm(config.n_embd, config.norm_eps, device)
        self.ln1 = LayerNorm(config.n_embd, config.norm_eps, device)
        self.ln2 = LayerNorm(config.n_embd, config.norm_eps, device)
        self.att = TimeMix(config, device)
        self.ffn = ChannelMix(config, device)

    def forward(self, x: Tensor, state: Rwkv4State, layer: int, mask: TokenMask) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, C) and the whole model's state -> x after this block, and this layer's new state tensors."""
        sums = (state.aa[layer], state.bb[layer], state.pp[layer])
        out, att_shift, (aa, bb, pp) = self.att(self.ln1(x), state.att_shift[layer], sums, mask)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift[layer], mask)
        return x + out, {"att_shift": att_shift, "aa": aa, "bb": bb, "pp": pp, "ffn_shift": ffn_shift}


class Rwkv4(BaseModel):
    """The whole model: see `BaseModel` for `forward(idx, state) -> (logits, state)`."""

    block_class = Block
    state_class = Rwkv4State
