"""What a trainer asks of data: batches by number, each a pure function of it, so that a run can go on anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of one length."""

    idx: Tensor  # (B, T + 1) int64: inputs idx[:, :-1], targets idx[:, 1:]
    loss_mask: Tensor | None = None  # (B, T) bool: which targets count in the loss; None: all
    document_start: Tensor | None = None  # (B, T) bool: inputs at which a document begins (state starts again)

    def rows(self, part: slice) -> Batch:
        """Some of the rows."""
        loss_mask, document_start = (
            None if mask is None else mask[part] for mask in (self.loss_mask, self.document_start)
        )
        return Batch(self.idx[part], loss_mask, document_start)

    @property
    def targets(self) -> int:
        """How many targets count."""
        return self.idx[:, 1:].numel() if self.loss_mask is None else int(self.loss_mask.sum())


class Batches(Protocol):
    """Batches without end."""

    def __getitem__(self, number: int) -> Batch:
        """Batch `number` (0, 1, 2, ...), always the same one."""
