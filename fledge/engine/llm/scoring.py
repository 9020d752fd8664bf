"""How probable a model finds a given text, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fledge.core.errors import UsageError
from fledge.engine.generation import ModelOutput, get_device

CHUNK = 128
"""Tokens scored in one call: all their logits exist at once, 33 MB for 128 tokens of a 65536-token vocabulary."""


class ScoredToken(NamedTuple):
    """One token of a scored text; `logprob` is the natural logarithm of its probability after all before it."""

    id: int
    bytes: bytes
    logprob: float


class ScoredText(list[ScoredToken]):
    """The scores of a text's tokens, in order."""

    @property
    def total(self) -> float:
        """Natural logarithm of the probability of the whole text."""
        return math.fsum(score.logprob for score in self)

    @property
    def bits_per_byte(self) -> float:
        """Bits needed for each byte of the text: comparable between models with different tokenizers."""
        length = sum(len(score.bytes) for score in self)
        if not length:
            raise UsageError("bits_per_byte needs a text of at least one byte")
        return -self.total / math.log(2) / length


def score(model: nn.Module, start: ModelOutput, ids: Sequence[int], chunk: int = CHUNK) -> list[float]:
    """Natural log probability of each of `ids` when they follow at `start`."""
    first, found = start.logits, []
    state = start.state
    for begin in range(0, len(ids), chunk):
        piece = list(ids[begin : begin + chunk])
        wanted = torch.tensor(piece, device=get_device(model))
        with torch.no_grad():
            logits, state = model(wanted[None], state)  # (1, T, V)
            shifted = torch.cat([first[None], logits[0, :-1]])  # (T, V): what was expected before each token
            found += (-torch.nn.functional.cross_entropy(shifted, wanted, reduction="none")).tolist()
            first = logits[0, -1]
    return found
