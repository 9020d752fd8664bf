"""The state as a value: everything a model remembers of what it has read, of fixed size.

One frozen dataclass a family, all with the same methods. The layout is stated here and nowhere else:

    layer axis first, batch axis second, in every tensor
    RWKV-5 Eagle, RWKV-6 Finch   att_shift (L, B, C)   wkv (L, B, H, K, V)   ffn_shift (L, B, C)
    RWKV-4                       att_shift (L, B, C)   aa, bb, pp (L, B, A)  ffn_shift (L, B, C)

All tensors are float32. The rows of a wkv matrix are key channels (the axis that r contracts and w decays), its columns
value channels; files of other tools in (V, K) order are converted at the border. A shift holds the last *normalised*
input of its sub-layer. A model never writes into a state it was given: it returns a new one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fledge.core.errors import StateError
from fledge.core.files import atomic_path
from fledge.models.config import ModelConfig

S = TypeVar("S", bound="State")

KIND = "fledge_state"
"""The key of a state file's metadata under which its class is named."""


@dataclass(frozen=True, eq=False)
class State:
    """Base of the state classes. Every field is a tensor with axes (layer, batch, ...)."""

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, in the order of declaration."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def batch(self) -> int:
        """B: how many sequences this state holds."""
        return int(next(iter(self.tensors().values())).shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def _map(self: S, function: Any) -> S:
        return type(self)(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def clone(self: S) -> S:
        """A copy that shares no memory with this one."""
        return self._map(lambda tensor: tensor.clone())

    def detach(self: S) -> S:
        """The same values, cut off from the graph that computed them."""
        return self._map(lambda tensor: tensor.detach())

    def to(self: S, device: torch.device | str) -> S:
        """The same values on another device. The dtype stays float32: a state in less precision is another state."""
        return self._map(lambda tensor: tensor.to(device))

    def rows(self: S, index: int | slice | Sequence[int]) -> S:
        """The state of some sequences of the batch; an int gives a batch of one."""
        if isinstance(index, slice):
            return self._map(lambda tensor: tensor[:, index])
        places = [index] if isinstance(index, int) else [int(place) for place in index]
        if any(not 0 <= place < self.batch for place in places):
            raise StateError(f"rows {places} do not all lie in a state of {self.batch} sequences (0 is the first)")
        chosen = torch.as_tensor(places, dtype=torch.long)
        return self._map(lambda tensor: tensor.index_select(1, chosen.to(tensor.device)))

    @classmethod
    def stack(cls: type[S], states: Sequence[S]) -> S:
        """Several states side by side as one batch (the batches add up)."""
        if not states:
            raise StateError("cannot stack an empty list of states")
        kind = type(states[0])
        if any(type(state) is not kind for state in states):
            names = sorted({type(state).__name__ for state in states})
            raise StateError(f"cannot stack states of different families: {', '.join(names)}")
        parts = [state.tensors() for state in states]
        return kind(**{name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this state as safetensors, whole or not at all. To which model it belongs is the caller's to record."""
        with atomic_path(path) as temporary:
            tensors = {name: tensor.detach().contiguous() for name, tensor in self.tensors().items()}
            save_file(tensors, temporary, metadata={KIND: type(self).__name__})

    @staticmethod
    def load(path: str | os.PathLike[str], device: str = "cpu") -> State:
        """The state that `save` wrote. Raises StateError for any other file; `check` tells whether it fits a model."""
        try:
            with safe_open(path, framework="pt", device=device) as file:
                kind = KINDS[(file.metadata() or {})[KIND]]
                names = [field.name for field in dataclasses.fields(kind)]
                if sorted(file.keys()) != sorted(names):
                    raise StateError(f"{path}: holds {', '.join(sorted(file.keys()))}, not {', '.join(names)}")
                return kind(**{name: file.get_tensor(name).float() for name in names})
        except KeyError:
            raise StateError(f"{path} is a safetensors file, but not a state saved by Fledge") from None
        except (OSError, SafetensorError) as error:
            raise StateError(f"{path} cannot be read as a state: {error}") from None

    def check(self, config: ModelConfig, batch: int) -> None:
        """Raise StateError unless this state belongs to a model of these sizes and has `batch` rows."""
        if type(self) is not state_class(config):
            raise StateError(f"a {type(self).__name__} does not fit a {config.family} model")
        if self.batch != batch:
            raise StateError(f"the state holds {self.batch} sequences, the input {batch}")
        for name, want in state_shapes(config, batch).items():
            have = tuple(getattr(self, name).shape)
            if have != want:
                raise StateError(f"state.{name} has shape {have}, but this model needs {want}")


@dataclass(frozen=True, eq=False)
class WkvState(State):
    """The state of RWKV-5 Eagle and RWKV-6 Finch."""

    att_shift: Tensor  # (L, B, C) float32
    wkv: Tensor  # (L, B, H, K, V) float32
    ffn_shift: Tensor  # (L, B, C) float32


@dataclass(frozen=True, eq=False)
class Rwkv4State(State):
    """The state of RWKV-4: a weighted sum of values aa, its weight bb, both scaled by exp(-pp)."""

    att_shift: Tensor  # (L, B, C) float32
    aa: Tensor  # (L, B, A) float32, numerator
    bb: Tensor  # (L, B, A) float32, denominator
    pp: Tensor  # (L, B, A) float32, the running maximum of the exponents
    ffn_shift: Tensor  # (L, B, C) float32


KINDS: dict[str, type[State]] = {"WkvState": WkvState, "Rwkv4State": Rwkv4State}


def state_class(config: ModelConfig) -> type[State]:
    """The class of this model's states."""
    return Rwkv4State if config.version == "4" else WkvState


def state_shapes(config: ModelConfig, batch: int) -> dict[str, tuple[int, ...]]:
    """Field name -> shape, for `batch` sequences: the layout at the top of this file in numbers."""
    L, H, N = config.n_layer, config.n_head, config.head_size
    shift = (L, batch, config.n_embd)
    if config.version == "4":
        sums = (L, batch, config.dim_att)
        return {"att_shift": shift, "aa": sums, "bb": sums, "pp": sums, "ffn_shift": shift}
    return {"att_shift": shift, "wkv": (L, batch, H, N, N), "ffn_shift": shift}


def zero_state(config: ModelConfig, batch: int, device: torch.device | str = "cpu") -> State:
    """The state of `batch` sequences of which nothing has been read."""
    tensors = {name: torch.zeros(shape, device=device) for name, shape in state_shapes(config, batch).items()}
    if "pp" in tensors:
        tensors["pp"].fill_(-1e30)  # no exponent has been seen yet
    return state_class(config)(**tensors)
