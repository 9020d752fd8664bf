"""What two texts are compared by: a hash for copies, and a MinHash signature for near copies.

Both are taken of the text in lower case and without the white space of ASCII; other spaces (U+00A0, U+3000) count. A
signature is the MinHash of all pieces of some characters (pieces of words would mean nothing in scripts without
spaces), and a fixed quarter of them is enough: which pieces count depends on the pieces alone, so the share that two
texts have in common stays an unbiased estimate. The package rensa finds the minima.

Here: from texts to numbers. Not here: what is compared with what (dedup.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.core.errors import UsageError
from fledge.data.pipeline.config import DedupConfig

U64 = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]

SPACES = b" \t\n\r\x0b\x0c"
SAMPLED = 4  # one shingle in SAMPLED is used
RECALL = 0.9  # of pairs exactly at the threshold that are to be found, at least
SEED = 20240410  # of rensa's permutations; signatures of two stores can be compared


def normalized(text: str) -> str:
    """What of a text counts when it is compared: all but case and the white space of ASCII."""
    return text.lower().encode().translate(None, SPACES).decode()


def exact_hash(text: str) -> tuple[int, int]:
    """128 bits of a normalized text, as two numbers."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def mixed(values: U64, salt: int) -> U64:
    """Each value spread over all 64 bits (the finalizer of splitmix64), differently for each salt."""
    mixed = values + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def rows_per_band(settings: DedupConfig) -> int:
    """The most rows a band can have so that pairs at the threshold still share a band RECALL of the time."""
    for rows in range(settings.permutations, 0, -1):
        bands = settings.permutations // rows
        if 1 - (1 - settings.threshold**rows) ** bands >= RECALL:
            return rows
    return 1


class MinHasher:
    """Texts to signatures, by the batch."""

    def __init__(self, settings: DedupConfig) -> None:
        """Raises UsageError where rensa is not installed."""
        try:
            from rensa import RMinHash
        except ImportError:
            raise UsageError(
                'near deduplication needs the package rensa: pip install "fledge[data]", or near = false under [dedup]'
            ) from None
        self._digest = RMinHash.digest_matrix_from_flat_token_hashes
        self.settings = settings
        self.rows = rows_per_band(settings)
        self.bands = settings.permutations // self.rows

    def signatures(self, texts: Sequence[str]) -> tuple[Signatures, npt.NDArray[np.bool_]]:
        """(N, permutations), and which of the normalized texts are long enough to have a signature."""
        pieces, ends = sampled_pieces(texts, self.settings.characters)
        offsets = np.concatenate([[0], ends]).astype(np.uint64)
        rows: Any = self._digest(pieces, offsets, self.settings.permutations, SEED).to_rows()
        return np.array(rows, dtype=np.uint32).reshape(len(texts), -1), np.diff(offsets) > 0

    def band_hashes(self, signatures: Signatures) -> U64:
        """(N, bands): two texts that share one of these are worth comparing."""
        used = signatures[:, : self.bands * self.rows].reshape(-1, self.bands, self.rows).astype(np.uint64)
        found = np.broadcast_to(np.arange(self.bands, dtype=np.uint64), used.shape[:2])
        for row in range(self.rows):
            found = mixed(found ^ used[:, :, row], row)
        return found


def sampled_pieces(texts: Sequence[str], width: int) -> tuple[U64, npt.NDArray[np.int64]]:
    """Hashes of the pieces of all texts that count, one text after the other, and where each text's end."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    ends = np.cumsum(lengths)
    if len(codes) < width:
        return np.empty(0, np.uint64), np.zeros(len(texts), np.int64)
    hashes = mixed(_windows(codes, width), 0)
    wanted = hashes & np.uint64(SAMPLED - 1) == 0
    for start, end in zip(ends - lengths, ends, strict=True):
        wanted[max(start, end - width + 1) : end] = False  # these would reach into the next text
    places = np.flatnonzero(wanted)
    return hashes[places], np.searchsorted(places, ends)


def _windows(codes: U64, width: int) -> U64:
    """A polynomial hash of each window of `width` codes: windows of 2, 4, 8, ... are put together by doubling."""
    factor = 0x9E3779B97F4A7C15
    found: U64 | None = None
    done, block, size = 0, codes + np.uint64(1), 1
    while True:
        if width & size:
            if found is None:
                found = block
            else:
                last = len(codes) - done - size + 1
                found = found[:last] * np.uint64(pow(factor, size, 1 << 64)) + block[done : done + last]
            done += size
        if done == width:
            assert found is not None
            return found
        step = len(block) - size
        block = block[:step] * np.uint64(pow(factor, size, 1 << 64)) + block[size : size + step]
        size *= 2


def similarity(one: Signatures, other: Signatures) -> npt.NDArray[np.float64]:
    """The estimated share of pieces in common, row by row."""
    return np.asarray((one == other).mean(axis=1))
