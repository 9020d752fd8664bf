"""The state as a value: everything that a model remembers, of fixed size (except for a transformer).

Each family has a frozen dataclass; all have the same methods. This docstring is the definition of the layout:

    layer axis first, batch axis second, in every tensor
    RWKV-5 Eagle, RWKV-6 Finch   att_shift (L, B, C)   wkv (L, B, H, K, V)   ffn_shift (L, B, C)
    RWKV-4                       att_shift (L, B, C)   aa, bb, pp (L, B, A)  ffn_shift (L, B, C)
    transformer                  keys, values (L, B, S, H, N)   begin, end (1, B): one layer, as all have the same

All tensors are float32 (begin and end are int64: they count tokens). The rows of a wkv matrix are key channels (the
axis that r contracts and w decays), its columns are value channels. Files of other tools in (V, K) order are converted
on import and export. A shift contains the last *normalized* input of its sub-layer. A model never changes the state
that it
receives: it returns a new one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fledge.core.errors import StateError
from fledge.core.files import atomic_path
from fledge.models.config import ModelConfig

S = TypeVar("S", bound="State")

KIND = "fledge_state"
"""The metadata key of a state file with the name of the state class."""


@dataclass(frozen=True, eq=False)
class State:
    """Base of the state classes. Every field is a tensor with axes (layer, batch, ...)."""

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, in the order of declaration."""
        # dataclasses.fields would build a new tuple in every call, and the engine calls this for every token.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def batch(self) -> int:
        """B: the number of sequences in this state."""
        return int(getattr(self, next(iter(self.__dataclass_fields__))).shape[1])

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def capacity(self) -> int:
        """S: the number of tokens that fit into a state that grows with the text; 0 if its size is fixed."""
        return 0

    def _map(self: S, function: Any) -> S:
        return type(self)(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def clone(self: S) -> S:
        """A copy that shares no memory with this one."""
        return self._map(lambda tensor: tensor.clone())

    def detach(self: S) -> S:
        """The same values, detached from the autograd graph."""
        return self._map(lambda tensor: tensor.detach())

    def to(self: S, device: torch.device | str) -> S:
        """The same values on another device. The dtype stays float32: rounding would make another state."""
        return self._map(lambda tensor: tensor.to(device))

    def rows(self: S, index: int | slice | Sequence[int]) -> S:
        """The state of some sequences of the batch; an int gives a batch of one. Raises StateError for a wrong
        index."""
        if isinstance(index, slice):
            return self._map(lambda tensor: tensor[:, index])
        indices = [index] if isinstance(index, int) else [int(i) for i in index]
        if any(not 0 <= i < self.batch for i in indices):
            raise StateError(f"rows {indices} are not all in a state of {self.batch} sequences (0 is the first)")
        selection = torch.as_tensor(indices, dtype=torch.long)
        return self._map(lambda tensor: tensor.index_select(1, selection.to(tensor.device)))

    @classmethod
    def stack(cls: type[S], states: Sequence[S]) -> S:
        """Several states as one batch: their sequences in order."""
        if not states:
            raise StateError("cannot stack an empty list of states")
        kind = type(states[0])
        if any(type(state) is not kind for state in states):
            names = sorted({type(state).__name__ for state in states})
            raise StateError(f"cannot stack states of different families: {', '.join(names)}")
        parts = [state.tensors() for state in kind._align(states)]
        return kind(**{name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})

    @classmethod
    def _align(cls: type[S], states: Sequence[S]) -> Sequence[S]:
        """The same states with tensors whose shapes differ only in the batch axis."""
        return states

    def encode(self, metadata: Mapping[str, str] | None = None, tensors: Mapping[str, Tensor] | None = None) -> bytes:
        """The content of a safetensors file with this state.

        metadata, tensors: entries to add to those of the state. All files with states are made here.
        """
        combined = {**self.tensors(), **(tensors or {})}
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in combined.items()}
        return safetensors.numpy.save(arrays, metadata={KIND: type(self).__name__, **(metadata or {})})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this state to a safetensors file atomically. The file does not record which model the state belongs
        to."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.encode())

    @staticmethod
    def load(path: str | os.PathLike[str], device: str = "cpu") -> State:
        """The state in a file of `save`. Raises StateError for any other file. `check` tests whether it fits a
        model."""
        try:
            with safe_open(path, framework="pt", device=device) as file:
                kind = KINDS[(file.metadata() or {})[KIND]]
                names = [field.name for field in dataclasses.fields(kind)]
                if sorted(file.keys()) != sorted(names):
                    raise StateError(f"{path}: contains {', '.join(sorted(file.keys()))}, not {', '.join(names)}")
                tensors = {name: file.get_tensor(name) for name in names}
                return kind(**{name: x.long() if name in COUNTS else x.float() for name, x in tensors.items()})
        except KeyError:
            raise StateError(f"{path} is a safetensors file, but not a state saved by Fledge") from None
        except (OSError, SafetensorError) as error:
            raise StateError(f"{path} cannot be read as a state: {error}") from None

    def check(self, config: ModelConfig, batch: int) -> None:
        """Raise StateError unless this state belongs to a model of these sizes and has `batch` rows."""
        if type(self) is not state_class(config):
            raise StateError(f"a {type(self).__name__} does not fit a {config.family} model")
        if self.batch != batch:
            raise StateError(f"the state has {self.batch} sequences, the input {batch}")
        for name, expected in state_shapes(config, batch, self.capacity).items():
            shape = tuple(getattr(self, name).shape)
            if shape != expected:
                raise StateError(f"state.{name} has shape {shape}, but this model needs {expected}")


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

    @property
    def mean(self) -> Tensor:
        """(L, B, A): the weighted mean of values; 0 before the first token."""
        return self.aa / self.bb.clamp_min(1e-30)


@dataclass(frozen=True, eq=False)
class KvState(State):
    """The KV cache of the transformer: the rotated keys, and the values, of all tokens read.

    Sequence b has `end[b]` tokens at the positions 0 to end[b] - 1. The rest is padding and is masked. Tokens before
    `begin[b]` belong to earlier documents and are masked too. The position of the next token is `end[b]`.
    """

    keys: Tensor  # (L, B, S, H, N) float32
    values: Tensor  # (L, B, S, H, N) float32
    begin: Tensor  # (1, B) int64
    end: Tensor  # (1, B) int64

    @property
    def capacity(self) -> int:
        """S: the number of tokens that fit."""
        return self.keys.shape[2] if self.keys.dim() == 5 else 0

    def rows(self, index: int | slice | Sequence[int]) -> KvState:
        """As in every state, without capacity that these sequences do not need."""
        selected = super().rows(index)
        longest = int(selected.end.max()) if selected.batch else 0
        return KvState(selected.keys[:, :, :longest], selected.values[:, :, :longest], selected.begin, selected.end)

    @classmethod
    def _align(cls, states: Sequence[KvState]) -> Sequence[KvState]:
        """All states padded with zeros to the capacity of the largest."""
        capacity = max(state.capacity for state in states)

        def pad(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, capacity - x.shape[2]))

        return [KvState(pad(state.keys), pad(state.values), state.begin, state.end) for state in states]

    def check(self, config: ModelConfig, batch: int) -> None:
        """As in every state; also checks that `begin` and `end` are within the capacity."""
        super().check(config, batch)
        limits = torch.zeros_like(self.begin), torch.full_like(self.end, self.capacity)
        counts = torch.cat((limits[0], self.begin, self.end, limits[1]))
        if counts.is_floating_point() or bool((counts.diff(dim=0) < 0).any()):
            raise StateError(f"begin and end of the state do not fit its capacity of {self.capacity} tokens")


KINDS: dict[str, type[State]] = {"WkvState": WkvState, "Rwkv4State": Rwkv4State, "KvState": KvState}

COUNTS = ("begin", "end")
"""The int64 fields of all classes."""


def state_class(config: ModelConfig) -> type[State]:
    """The class of this model's states."""
    if config.version == "llama":
        return KvState
    return Rwkv4State if config.version == "4" else WkvState


def state_shapes(config: ModelConfig, batch: int, capacity: int = 0) -> dict[str, tuple[int, ...]]:
    """Field name -> shape, for `batch` sequences, in the layout of the module's docstring.

    capacity: number of tokens that fit into a transformer's state.
    """
    L, H, N = config.n_layer, config.n_head, config.head_size
    if config.version == "llama":
        tokens = (L, batch, capacity, H, N)
        return {"keys": tokens, "values": tokens, "begin": (1, batch), "end": (1, batch)}
    shift = (L, batch, config.n_embd)
    if config.version == "4":
        sums = (L, batch, config.dim_att)
        return {"att_shift": shift, "aa": sums, "bb": sums, "pp": sums, "ffn_shift": shift}
    return {"att_shift": shift, "wkv": (L, batch, H, N, N), "ffn_shift": shift}


def tuned_state(config: ModelConfig, layers: Sequence[Tensor], batch: int, device: torch.device | str = "cpu") -> State:
    """The tuned initial state of `batch` sequences: time_state (H, V, K) of each layer -> wkv (L, B, H, K, V).

    Files and parameters have the value channels first. Gradients flow back to the parameters.
    """
    wkv = torch.stack(list(layers)).float().transpose(-1, -2)[:, None].expand(-1, batch, -1, -1, -1)
    return state_class(config)(**{**zero_state(config, batch, device).tensors(), "wkv": wkv.contiguous()})


def zero_state(config: ModelConfig, batch: int, device: torch.device | str = "cpu") -> State:
    """The state of `batch` sequences before the first token."""
    tensors = {
        name: torch.zeros(shape, device=device, dtype=torch.long if name in COUNTS else torch.float32)
        for name, shape in state_shapes(config, batch).items()
    }
    if "pp" in tensors:
        tensors["pp"].fill_(-1e30)  # no exponent so far
    return state_class(config)(**tensors)
