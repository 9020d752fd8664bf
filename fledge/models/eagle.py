"""RWKV-5 Eagle (5.2, "x052"), and its previews 5.0 and 5.1.

symbol           shape        parameter                      equation in the paper
1 - mu           (1, 1, C)    att.time_mix_{k,v,r,g}         3-4, weight of the *current* token (Finch stores mu)
omega            (H, N)       att.time_decay                 decay exp(-exp(omega)); (H) in 5.0 and 5.1
u                (H, N)       att.time_faaaa                 5; (H) in 5.0 and 5.1, and old 5.0 stores
                                                             log u as att.time_first
W_r, k, v, g, o  (A, C)       att.{receptance,key,value,gate,output}.weight; output is (C, A); 5.0 has no gate
                 (H, V, K)    att.time_state, only with a tuned initial state; transposed to (H, K, V) here

C = n_embd, A = dim_att = H N, F = dim_ffn; B batch, T time; K = V = N.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fledge.kernels import wkv
from fledge.models.base import BaseModel, TokenMask
from fledge.models.config import ModelConfig
from fledge.models.layers import HeadNorm, LayerNorm, Linear, channel_mix, own_value, vector
from fledge.models.state import WkvState


class TimeMix(nn.Module):
    """Static token shift, then the recurrence with a static decay per channel (per head before 5.2)."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        C, A, H, N = config.n_embd, config.dim_att, config.n_head, config.head_size
        self.n_head, self.head_size = H, N
        self.has_gate = config.version != "5.0"
        self.bonus_is_log = config.bonus == "time_first"
        self.time_mix_k = vector(C, device)
        self.time_mix_v = vector(C, device)
        self.time_mix_r = vector(C, device)
        if self.has_gate:
            self.time_mix_g = vector(C, device)
        per_head = (H, N) if config.version == "5.2" else (H,)
        self.time_decay = nn.Parameter(torch.empty(per_head, device=device))
        if self.bonus_is_log:
            self.time_first = nn.Parameter(torch.empty(per_head, device=device))
        else:
            self.time_faaaa = nn.Parameter(torch.empty(per_head, device=device))
        self.receptance = Linear(C, A, device)
        self.key = Linear(C, A, device)
        self.value = Linear(C, A, device)
        if self.has_gate:
            self.gate = Linear(C, A, device)
        self.output = Linear(A, C, device)
        self.ln_x = HeadNorm(H, A, config.group_norm_eps, device)
        if config.tuned_state:
            self.time_state = nn.Parameter(torch.empty(H, N, N, device=device))

    def decay_and_bonus(self) -> tuple[Tensor, Tensor]:
        """w, the log of the decay, and u, both (H, K) float32."""
        w = -torch.exp(self.time_decay.float())
        u = torch.exp(self.time_first.float()) if self.bonus_is_log else self.time_faaaa.float()
        if w.dim() == 1:  # 5.0 and 5.1: one number per head
            w, u = (x[:, None].expand(-1, self.head_size) for x in (w, u))
        return w, u

    def forward(self, x: Tensor, shift: Tensor, state: Tensor, mask: TokenMask) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), shift (B, C), state (B, H, K, V) -> output (B, T, C), new shift, new state."""
        B, T, _ = x.shape
        heads = (B, T, self.n_head, self.head_size)
        current = [self.time_mix_k, self.time_mix_v, self.time_mix_r, *([self.time_mix_g] if self.has_gate else [])]
        xk, xv, xr, *xg = mask.mix(x, shift, [1 - weight.float() for weight in current], self.key.dtype)
        r = self.receptance(xr).float().view(heads)  # (B, T, H, K)
        k = mask.zero_padding(self.key(xk).float()).view(heads)
        v = self.value(xv).float().view(heads)  # (B, T, H, V)
        w, u = self.decay_and_bonus()
        w = mask.mask_decay(w.reshape(1, 1, -1).expand(B, T, -1)).unflatten(-1, heads[2:])  # (B, T, H, K)
        y, state = wkv(r, k, v, w, u, state)
        y = mask.replace_starts(y, lambda: own_value(r, k, v, u))
        gate = self.gate(xg[0]) if self.has_gate else None  # (B, T, A)
        return self.output(self.ln_x(y, gate, self.output.dtype)), mask.last_input(x, shift), state


class ChannelMix(nn.Module):
    """Token shift with a static mix, then a squared-ReLU MLP behind a gate (equations 10-13)."""

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

    def forward(self, x: Tensor, state: WkvState, layer: int, mask: TokenMask) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, C) and the whole model's state -> x after this block, and this layer's new state tensors."""
        out, att_shift, wkv_state = self.att(self.ln1(x), state.att_shift[layer], state.wkv[layer], mask)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift[layer], mask)
        return x + out, {"att_shift": att_shift, "wkv": wkv_state, "ffn_shift": ffn_shift}


class Eagle(BaseModel):
    """The whole model: see `BaseModel` for `forward(idx, state) -> (logits, state)`."""

    block_class = Block
    state_class = WkvState
