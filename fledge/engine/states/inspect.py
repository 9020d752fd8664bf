"""Measurements of a state for display: how long each head remembers, how much it holds, and how far states differ.

Tables have one row for each layer and one column for each head, (L, H). RWKV-4 has no heads: each of its layers counts
as one head.
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
    """(L, H): tokens until half of what a head has stored is gone, the median over its channels.

    The decay of Eagle is constant. The decay of Finch depends on the token; this is its constant part. None for a
    transformer, which does not forget.
    """
    config = get_config(model)
    if config.version == "llama":
        return None
    if isinstance(model, NativeModel):
        parameters = model.time_decays
    else:
        parameters = [block.att.time_decay.detach().float().cpu() for block in cast(Any, model).blocks]
    decays = torch.stack([_log_decay(parameter, config) for parameter in parameters])
    rates = decays.double().clamp(max=-1e-12)  # (L, H, N), below 0
    return np.asarray((-math.log(2) / rates).median(dim=-1).values.numpy())


def head_norms(state: State) -> Table | None:
    """(L, H): the Frobenius norm of each head's memory, for the first sequence. None for a transformer."""
    memory = _memory(state)
    return None if memory is None else np.asarray(memory.flatten(2).norm(dim=-1).double().numpy())


def relative_changes(before: State, after: State) -> Table | None:
    """(L, H): how much each head's memory has changed, ||S_after - S_before|| / ||S_before||. None for a transformer.

    The value is 1 if the head was empty before.
    """
    old, new = _memory(before), _memory(after)
    if old is None or new is None:
        return None
    base, difference = old.flatten(2).norm(dim=-1).double(), (new - old).flatten(2).norm(dim=-1).double()
    ratio = torch.where(base > 0, difference / base.clamp_min(1e-30), (difference > 0).double())
    return np.asarray(ratio.numpy())


def layer_distances(first: State, second: State) -> dict[str, Table]:
    """The distance of two states in each layer: field -> (L,), ||A - B|| / max(||A||, ||B||), 0 if they are equal.

    Compares the first sequence of each. Raises StateError for states of different sizes, and for a transformer.
    """
    ours, theirs = _fields(first), _fields(second)
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        raise StateError("the states belong to models of different sizes and cannot be compared")
    distances: dict[str, Table] = {}
    for name, tensor in ours.items():
        a, b = tensor.flatten(1).double(), theirs[name].flatten(1).double()
        larger = torch.maximum(a.norm(dim=-1), b.norm(dim=-1))
        distances[name] = np.asarray(((a - b).norm(dim=-1) / larger.clamp_min(1e-30)).numpy())
    return distances


def _fields(state: State) -> dict[str, torch.Tensor]:
    """Name -> (L, ...) of the first sequence."""
    memory = _memory(state)
    if memory is None:
        raise StateError("the state of a transformer is the text itself and cannot be compared layer by layer")
    shifts = {name: state.tensors()[name][:, 0].cpu() for name in ("att_shift", "ffn_shift")}
    return {"att_shift": shifts["att_shift"], "memory": memory, "ffn_shift": shifts["ffn_shift"]}


def _memory(state: State) -> torch.Tensor | None:
    """(L, H, ...) of the first sequence."""
    if isinstance(state, WkvState):
        return state.wkv[:, 0].cpu()
    if isinstance(state, Rwkv4State):
        return state.mean[:, :1].cpu()
    assert isinstance(state, KvState)
    return None


def _log_decay(parameter: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """time_decay as stored in a checkpoint -> the logarithm of the decay (H, N), which is -exp(time_decay)."""
    heads, channels = config.n_head or 1, config.dim_att
    flat = parameter.reshape(-1)
    if flat.numel() != channels:  # 5.0 and 5.1: one number for each head
        flat = flat[:, None].expand(heads, channels // heads).reshape(-1)
    return -torch.exp(flat).reshape(heads, channels // heads)
