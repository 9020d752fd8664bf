"""RWKV-6 Finch (version 6.0, "x060").

symbol           shape        parameter                      equation in the paper
mu_x             (1, 1, C)    att.time_maa_x                 14-16, weight of the previous token in the LoRA's input
lambda_w..g      (1, 1, C)    att.time_maa_{w,k,v,r,g}       14, static part of the mix
A, B             (C, 5 Dm)    att.time_maa_w1, (5, Dm, C) att.time_maa_w2; order w, k, v, r, g
lambda_d         (1, 1, A)    att.time_decay                 17
A_d, B_d         (C, Dd)      att.time_decay_w1, (Dd, A) att.time_decay_w2
u                (H, K)       att.time_faaaa                 18
W_r, k, v, g, o  (A, C)       att.{receptance,key,value,gate,output}.weight; output is (C, A)
                 (H, V, K)    att.time_state, only with a tuned initial state; transposed to (H, K, V) here

C = n_embd, A = dim_att = H N, Dm = mix_rank, Dd = decay_rank, F = dim_ffn; B batch, T time; K = V = N.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fledge.kernels import wkv
from fledge.kernels.fused import wkv_with_decay
from fledge.models.base import BaseModel, TokenMask
from fledge.models.config import ModelConfig
from fledge.models.layers import HeadNorm, LayerNorm, Linear, channel_mix, own_value, vector
from fledge.models.state import WkvState


class TimeMix(nn.Module):
    """Data-dependent token shift, then the recurrence with data-dependent decay."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        C, A, H, N = config.n_embd, config.dim_att, config.n_head, config.head_size
        self.n_head, self.head_size = H, N
        self.scaled_keys = config.scaled_keys
        self.time_maa_x = vector(C, device)
        self.time_maa_w = vector(C, device)
        self.time_maa_k = vector(C, device)
        self.time_maa_v = vector(C, device)
        self.time_maa_r = vector(C, device)
        self.time_maa_g = vector(C, device)
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * config.mix_rank, device=device))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, config.mix_rank, C, device=device))
        self.time_decay = vector(A, device)
        self.time_decay_w1 = nn.Parameter(torch.empty(C, config.decay_rank, device=device))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, A, device=device))
        self.time_faaaa = nn.Parameter(torch.empty(H, N, device=device))
        self.receptance = Linear(C, A, device)
        self.key = Linear(C, A, device)
        self.value = Linear(C, A, device)
        self.gate = Linear(C, A, device)
        self.output = Linear(A, C, device)
        self.ln_x = HeadNorm(H, A, config.group_norm_eps, device)
        if config.tuned_state:
            self.time_state = nn.Parameter(torch.empty(H, N, N, device=device))

    def mixed_inputs(self, x: Tensor, shift: Tensor, mask: TokenMask) -> tuple[Tensor, ...]:
        """x_w (float32) and x_k, x_v, x_r, x_g (in the dtype of the products), (B, T, C) each (equations 14-16)."""
        (xx,) = mask.mix(x, shift, [self.time_maa_x], x.dtype)
        low = torch.tanh(xx @ self.time_maa_w1.float())  # (B, T, 5 Dm)
        low = low.flatten(0, 1).unflatten(1, (5, -1)).transpose(0, 1)  # (5, B T, Dm)
        up = self.time_maa_w2.float()  # (5, Dm, C)
        (xw,) = mask.mix(x, shift, [self.time_maa_w], x.dtype, low[:1], up[:1])
        static = [self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g]
        return xw, *mask.mix(x, shift, static, self.key.dtype, low[1:], up[1:])

    def forward(self, x: Tensor, shift: Tensor, state: Tensor, mask: TokenMask) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), shift (B, C), state (B, H, K, V) -> output (B, T, C), new shift, new state."""
        B, T, _ = x.shape
        heads = (B, T, self.n_head, self.head_size)
        xw, xk, xv, xr, xg = self.mixed_inputs(x, shift, mask)
        r = self.receptance(xr).view(heads)  # (B, T, H, K)
        k = mask.zero_padding(self.key(xk)).view(heads)
        v = self.value(xv).view(heads)  # (B, T, H, V)
        g = self.gate(xg)  # (B, T, A)
        decay = torch.tanh(xw @ self.time_decay_w1.float()) @ self.time_decay_w2.float()  # (B, T, A)
        y, state = self.recurrence(r, k, v, decay.view(heads), state, mask)
        return self.output(self.ln_x(y, g, self.output.dtype)), mask.last_input(x, shift), state

    def recurrence(
        self, r: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, mask: TokenMask
    ) -> tuple[Tensor, Tensor]:
        """The recurrence with w = -exp(time_decay + decay) (equations 17-19); decay (B, T, H, K)."""
        u = self.time_faaaa.float()
        base = self.time_decay.float().flatten()  # (A)
        if mask.is_empty and not self.scaled_keys:
            return wkv_with_decay(r, k, v, decay, base, u, state)
        r, k, v = r.float(), k.float(), v.float()
        decay = decay + base.view_as(u)
        if self.scaled_keys:  # channels that decay slowly get smaller keys
            k = k * torch.exp(decay.clamp(max=0.0))
        w = mask.mask_decay(-torch.exp(decay).flatten(2)).view_as(r)
        y, state = wkv(r, k, v, w, u, state)
        return mask.replace_starts(y, lambda: own_value(r, k, v, u)), state


class ChannelMix(nn.Module):
    """Token shift with a static mix, then a squared-ReLU MLP behind a gate (equations 10-13)."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        C, F = config.n_embd, config.dim_ffn
        self.time_maa_k = vector(C, device)
        self.time_maa_r = vector(C, device)
        self.key = Linear(C, F, device)
        self.receptance = Linear(C, C, device)
        self.value = Linear(F, C, device)

    def forward(self, x: Tensor, shift: Tensor, mask: TokenMask) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) -> output (B, T, C), new shift."""
        xk, xr = mask.mix(x, shift, [self.time_maa_k, self.time_maa_r], self.key.dtype)
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


class Finch(BaseModel):
    """The whole model: see `BaseModel` for `forward(idx, state) -> (logits, state)`."""

    block_class = Block
    state_class = WkvState
