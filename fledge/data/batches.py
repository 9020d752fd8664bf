"""The batches of a training run. Each is a pure function of its number, so a run can resume at any batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of one length."""

    idx: Tensor  # (B, T + 1) int64: inputs idx[:, :-1], targets idx[:, 1:]
    loss_mask: Tensor | None = None  # (B, T) bool: the targets that count in the loss; None: all
    document_start: Tensor | None = None  # (B, T) bool: inputs at which a document begins (the state is reset)

    def rows(self, part: slice) -> Batch:
        """The batch of the rows in a slice."""
        loss_mask, document_start = (
            None if mask is None else mask[part] for mask in (self.loss_mask, self.document_start)
        )
        return Batch(self.idx[part], loss_mask, document_start)

    @property
    def targets(self) -> int:
        """Number of targets that count in the loss."""
        return self.idx[:, 1:].numel() if self.loss_mask is None else int(self.loss_mask.sum())


class Batches(Protocol):
    """An infinite sequence of batches."""

    def __getitem__(self, number: int) -> Batch:
        """Batch `number` (0, 1, 2, ...). The same number always returns the same batch."""
