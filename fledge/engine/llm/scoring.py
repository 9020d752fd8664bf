"""Log probabilities of the tokens of a given text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fledge.core.errors import UsageError
from fledge.engine.generation import ModelOutput, get_device

CHUNK = 128
"""Tokens scored in one call. All their logits exist at the same time: 33 MB for a vocabulary of 65,536 tokens."""


class ScoredToken(NamedTuple):
    """One token of a scored text. `logprob` is the natural log probability given everything before it."""

    id: int
    bytes: bytes
    logprob: float


class ScoredText(list[ScoredToken]):
    """The scored tokens of a text, in order."""

    @property
    def total(self) -> float:
        """Natural log probability of the whole text."""
        return math.fsum(token.logprob for token in self)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, which is comparable between models with different tokenizers.

        Raises UsageError for a text without bytes.
        """
        length = sum(len(token.bytes) for token in self)
        if not length:
            raise UsageError("bits_per_byte needs a text of at least one byte")
        return -self.total / math.log(2) / length


def score_tokens(model: nn.Module, start: ModelOutput, ids: Sequence[int], chunk: int = CHUNK) -> list[float]:
    """Natural log probability of each of `ids`, which follow the text that led to `start`."""
    logits_before, logprobs = start.logits, list[float]()
    state = start.state
    for begin in range(0, len(ids), chunk):
        targets = torch.tensor(list(ids[begin : begin + chunk]), device=get_device(model))  # (T,)
        with torch.no_grad():
            logits, state = model(targets[None], state)  # (1, T, V)
            shifted = torch.cat([logits_before[None], logits[0, :-1]])  # (T, V): the prediction before each token
            logprobs += (-torch.nn.functional.cross_entropy(shifted, targets, reduction="none")).tolist()
            logits_before = logits[0, -1]
    return logprobs
