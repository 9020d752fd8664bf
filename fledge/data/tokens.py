"""A token store: the ids of a corpus in one flat uint16 file, documents separated by id 0, and windows out of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fledge.core.errors import UsageError
from fledge.core.files import atomic_path

SEPARATOR = 0  # the end-of-text id of World and of every pruned vocabulary
STORED = np.dtype("<u2")
LARGEST = 65535


def write_tokens(path: Path, documents: Iterable[list[int]]) -> int:
    """Write documents one after the other, each followed by id 0. Returns the number of ids written."""
    total = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for ids in documents:
            if max(ids, default=0) > LARGEST:
                raise UsageError(f"token id {max(ids)} does not fit a token store, whose ids go up to {LARGEST}")
            chunk = np.asarray([*ids, SEPARATOR], dtype=STORED)
            file.write(chunk.tobytes())
            total += len(chunk)
    return total


def open_tokens(path: Path) -> npt.NDArray[np.uint16]:
    """The ids of a store, memory-mapped."""
    if not path.is_file() or path.stat().st_size < 4 or path.stat().st_size % 2:
        raise UsageError(f"{path} is not a token store with at least two tokens; run the prepare step first")
    return np.memmap(path, dtype=STORED, mode="r")


class Windows:
    """Windows of `length` + 1 ids at shuffled, non-overlapping places, none visited twice in an epoch.

    Batch number n is a pure function of (seed, n), so a run can stop anywhere and go on with the same data. Every epoch
    cuts the text at other places, and leaves out less than one batch and two windows of it.
    """

    def __init__(self, tokens: npt.NDArray[np.uint16], length: int, batch: int, seed: int) -> None:
        self.tokens, self.length, self.batch, self.seed = tokens, length, batch, seed
        self.slots = (len(tokens) - 1) // length - 1  # one less leaves room for the random phase of an epoch
        if self.slots < batch:
            raise UsageError(f"{len(tokens)} tokens are too few for batches of {batch} windows of {length} tokens")
        self.per_epoch = self.slots // batch
        self._epoch = -1  # of which `_starts` holds the shuffled places
        self._starts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, number: int) -> npt.NDArray[np.int64]:
        """Batch `number` (0, 1, 2, ...) as int64 (batch, length + 1)."""
        epoch, step = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._starts = epoch, rng.permutation(self.slots) * self.length + rng.integers(self.length)
        starts = self._starts[step * self.batch : (step + 1) * self.batch]
        return np.stack([self.tokens[s : s + self.length + 1] for s in starts]).astype(np.int64)
