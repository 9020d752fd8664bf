"""What a trainer asks of data: batches by number, each a pure function of it, so that a run can go on anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of one length."""

    idx: Tensor  # (B, T + 1) int64: inputs idx[:, :-1], targets idx[:, 1:]
    counted: Tensor | None = None  # (B, T) bool: which targets count in the loss; None: all
    fresh: Tensor | None = None  # (B, T) bool: inputs at which a document begins (state starts anew)

    def rows(self, part: slice) -> Batch:
        """Some of the rows."""
        counted, fresh = (None if mask is None else mask[part] for mask in (self.counted, self.fresh))
        return Batch(self.idx[part], counted, fresh)

    @property
    def targets(self) -> int:
        """How many targets count."""
        return self.idx[:, 1:].numel() if self.counted is None else int(self.counted.sum())


class Batches(Protocol):
    """Batches without end."""

    def __getitem__(self, number: int) -> Batch:
        """Batch `number` (0, 1, 2, ...), always the same one."""
