"""Training rows cut from one long array of token ids, in a shuffled order that can be resumed at any batch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from fledge.core.errors import UsageError
from fledge.data.batches import Batch
from fledge.data.store import SEPARATOR

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.int32]


class Windows:
    """Windows of `length` + 1 ids at shuffled, non-overlapping positions, each visited once per epoch.

    Batch number n is a pure function of (seed, n). Each epoch cuts the tokens at a different offset and omits less than
    one batch plus two windows. reset_at_document: mark the document starts (`Batch.document_start`), so that no
    information crosses a document boundary. A document starts at the separator of the previous document.
    """

    def __init__(self, tokens: Tokens, length: int, batch: int, seed: int, *, reset_at_document: bool = False) -> None:
        self.tokens, self.length, self.batch, self.seed, self.reset_at_document = (
            tokens,
            length,
            batch,
            seed,
            reset_at_document,
        )
        self.slots = (len(tokens) - 1) // length - 1  # minus one: room for the random offset of an epoch
        if self.slots < batch:
            raise _make_size_error(len(tokens), batch, length)
        self.per_epoch = self.slots // batch
        self._epoch = -1  # the epoch of the shuffled positions in `_starts`
        self._starts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, number: int) -> Batch:
        """Batch `number` (0, 1, 2, ...)."""
        epoch, step = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._starts = epoch, rng.permutation(self.slots) * self.length + rng.integers(self.length)
        starts = self._starts[step * self.batch : (step + 1) * self.batch]
        return _build_batch(self.tokens, starts, self.length, self.reset_at_document)


class OfficialWindows:
    """The windows of RWKV-LM in its order: slot ((p (sqrt 5 - 1) / 2) i^3) mod p for sample number i, from 1.

    p is the largest prime with p mod 3 = 2 below the number of slots; cubing modulo p is a permutation. Samples are
    numbered as in one RWKV-LM process with this batch size.
    """

    def __init__(self, tokens: Tokens, length: int, batch: int, *, reset_at_document: bool = False) -> None:
        self.tokens, self.length, self.batch, self.reset_at_document = tokens, length, batch, reset_at_document
        self.prime = find_magic_prime(len(tokens) // length)
        self._factor = int(self.prime * (math.sqrt(5) - 1) / 2)
        self.per_epoch = self.prime // batch
        if not self.per_epoch:
            raise _make_size_error(len(tokens), batch, length)

    def __getitem__(self, number: int) -> Batch:
        """Batch `number` (0, 1, 2, ...)."""
        samples = range(1 + number * self.batch, 1 + (number + 1) * self.batch)
        slots = [self._factor * sample**3 % self.prime for sample in samples]
        return _build_batch(self.tokens, np.array(slots) * self.length, self.length, self.reset_at_document)


def _make_size_error(tokens: int, batch: int, length: int) -> UsageError:
    return UsageError(f"{tokens} tokens are too few for batches of {batch} windows of {length} tokens")


def find_magic_prime(slots: int) -> int:
    """The largest prime below `slots` with remainder 2 modulo 3. Raises UsageError if there is none."""
    for candidate in range(slots - 1, 1, -1):
        if candidate % 3 == 2 and all(candidate % factor for factor in range(2, math.isqrt(candidate) + 1)):
            return candidate
    raise UsageError(f"{slots} windows are too few for the official order, which needs at least 3")


def _build_batch(tokens: Tokens, starts: npt.NDArray[np.int64], length: int, reset_at_document: bool) -> Batch:
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    idx = torch.from_numpy(rows)
    return Batch(idx, document_start=idx[:, :-1] == SEPARATOR if reset_at_document else None)
