"""The share of zeros in the channel mix, relu(k)^2, by layer in float32. A product can skip a zero input.

The kernels skip a pair of adjacent inputs if both are zero, so these pairs are counted too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fledge.checkpoint import Checkpoint, assemble
from fledge.models import BaseModel
from fledge.models.state import State

WINDOW = 512  # tokens


@dataclass
class LayerSparsity:
    """Counts of one layer over all tokens."""

    layer: int
    numbers: int = 0
    zeros: int = 0
    zero_pairs: int = 0

    @property
    def zero_share(self) -> float:
        """The share of zeros."""
        return self.zeros / self.numbers

    @property
    def pair_share(self) -> float:
        """The share of pairs (even, odd) of zeros."""
        return 2 * self.zero_pairs / self.numbers

    def record(self) -> dict[str, float]:
        """Return counts and shares as JSON."""
        return {**asdict(self), "zero_share": self.zero_share, "pair_share": self.pair_share}

    def count(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A pre-hook of ffn.value: its input is relu(k)^2, (B, T, F)."""
        zero = inputs[0].flatten(0, -2) == 0
        zero = nn.functional.pad(zero, (0, zero.shape[1] % 2), value=True)
        self.numbers += zero.numel()
        self.zeros += int(zero.sum())
        self.zero_pairs += int((zero[:, 0::2] & zero[:, 1::2]).sum())


def count_sparsity(source: Checkpoint, sequences: Sequence[Sequence[int]]) -> list[LayerSparsity]:
    """Run each sequence of ids from the initial state through a dense checkpoint, and count the zeros."""
    model = assemble(source.config, source.tensors, dtype=torch.float32)
    assert isinstance(model, BaseModel)
    layers = [LayerSparsity(number) for number in range(source.config.n_layer)]
    for layer, block in zip(layers, model.blocks, strict=True):
        cast(Any, block).ffn.value.register_forward_pre_hook(layer.count)
    with torch.inference_mode():
        for ids in sequences:
            state: State | None = None
            for start in range(0, len(ids), WINDOW):
                _, state = model(torch.tensor([list(ids[start : start + WINDOW])]), state, last=True)
    return layers
