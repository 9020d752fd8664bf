"""What training reads: numbered batches of token ids, and which of their targets count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Batches(Protocol):
    """An endless sequence of batches."""

    def __getitem__(self, number: int) -> Batch:
        """Batch `number` (0, 1, 2, ...): a pure function of the number."""


@dataclass(frozen=True)
class Batch:
    """Rows of ids."""

    idx: Tensor  # (B, T + 1) int64: inputs idx[:, :-1], targets idx[:, 1:]
    counted: Tensor | None = None  # (B, T) bool: which targets count in the loss; None: all
    fresh: Tensor | None = None  # (B, T) bool: inputs at which a document begins (state starts anew)
