"""What a state looks like: how long each head remembers, how much it holds, and what changed it.

Numbers for a picture, (L, H) each: layers down, heads across. RWKV-4 has no heads: its channels count as one a layer.
Not here: drawing.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fledge.core.errors import StateError
from fledge.engine.generation import get_config
from fledge.models.config import ModelConfig
from fledge.models.native_model import NativeModel
from fledge.models.state import KvState, Rwkv4State, State, WkvState

Table = npt.NDArray[np.float64]


def half_lives(model: nn.Module) -> Table | None:
    """(L, H): the tokens after which half of what a head was told is forgotten, the median over its channels.

    Eagle's decay is a constant; of Finch's, which each token shifts, it is the part that no token has a hand in. None
    for a transformer, which forgets nothing.
    """
    config = get_config(model)
    if config.version == "llama":
        return None
    if isinstance(model, NativeModel):
        raw = model.time_decays
    else:
        raw = [block.att.time_decay.detach().float().cpu() for block in cast(Any, model).blocks]
    decays = torch.stack([_log_decay(one, config) for one in raw])
    rates = decays.double().clamp(max=-1e-12)  # (L, H, N), below 0
    return np.asarray((-math.log(2) / rates).median(dim=-1).values.numpy())


def norms(state: State) -> Table | None:
    """(L, H): the Frobenius norm of what each head holds, for the first sequence; None for a transformer."""
    held = _held(state)
    return None if held is None else np.asarray(held.flatten(2).norm(dim=-1).double().numpy())


def change(before: State, after: State) -> Table | None:
    """(L, H): how much what each head holds has changed; None for a transformer.

    That is ||S_after - S_before|| / ||S_before||, and 1 where there was nothing before.
    """
    old, new = _held(before), _held(after)
    if old is None or new is None:
        return None
    base, moved = old.flatten(2).norm(dim=-1).double(), (new - old).flatten(2).norm(dim=-1).double()
    ratio = torch.where(base > 0, moved / base.clamp_min(1e-30), (moved > 0).double())
    return np.asarray(ratio.numpy())


def distances(one: State, other: State) -> dict[str, Table]:
    """How far two states are apart in each layer: field -> (L,), ||A - B|| / max(||A||, ||B||), so 0 where they agree.

    The first sequence of each. Raises StateError for states that cannot be compared.
    """
    mine, theirs = _fields(one), _fields(other)
    if {name: x.shape for name, x in mine.items()} != {name: x.shape for name, x in theirs.items()}:
        raise StateError("the states are of models of different sizes and have nothing to compare")
    found: dict[str, Table] = {}
    for name, a in mine.items():
        a, b = a.flatten(1).double(), theirs[name].flatten(1).double()
        larger = torch.maximum(a.norm(dim=-1), b.norm(dim=-1))
        found[name] = np.asarray(((a - b).norm(dim=-1) / larger.clamp_min(1e-30)).numpy())
    return found


def _fields(state: State) -> dict[str, torch.Tensor]:
    """Name -> (L, ...) of the first sequence."""
    held = _held(state)
    if held is None:
        raise StateError("a transformer's state holds the text itself and cannot be compared layer by layer")
    shifts = {name: state.tensors()[name][:, 0].cpu() for name in ("att_shift", "ffn_shift")}
    return {"att_shift": shifts["att_shift"], "memory": held, "ffn_shift": shifts["ffn_shift"]}


def _held(state: State) -> torch.Tensor | None:
    """(L, H, ...) of the first sequence."""
    if isinstance(state, WkvState):
        return state.wkv[:, 0].cpu()
    if isinstance(state, Rwkv4State):
        return state.mean[:, :1].cpu()
    assert isinstance(state, KvState)
    return None


def _log_decay(raw: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """time_decay as a checkpoint has it -> the logarithm of the decay, -exp of it in every family; (H, N)."""
    heads, channels = config.n_head or 1, config.dim_att
    flat = raw.reshape(-1)
    if flat.numel() != channels:  # 5.0 and 5.1: one number a head
        flat = flat[:, None].expand(heads, channels // heads).reshape(-1)
    return -torch.exp(flat).reshape(heads, channels // heads)
