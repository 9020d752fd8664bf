"""Hashes of texts for exact duplicates, and MinHash signatures for near duplicates.

Both ignore case and ASCII white space; other spaces (U+00A0, U+3000) count. A signature is the MinHash of the shingles
of a text: all substrings of some number of characters. Shingles of words would not work for scripts without spaces.
Only a fixed quarter of the shingles is used. The choice depends on the shingle alone, so the estimated similarity is
unbiased. The package rensa computes the minima.
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
SAMPLE_EVERY = 4  # one shingle in SAMPLE_EVERY is used; a power of two
MIN_RECALL = 0.9  # share of the pairs at the threshold that must share a band
SEED = 20240410  # seed of the permutations; it is constant, so signatures of two stores are comparable


def normalize_text(text: str) -> str:
    """The text in lower case without ASCII white space, for comparisons."""
    return text.lower().encode().translate(None, SPACES).decode()


def hash_exact(text: str) -> tuple[int, int]:
    """A 128-bit hash of a normalized text, as two 64-bit numbers."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def mix_hashes(values: U64, salt: int) -> U64:
    """Hash each value with the finalizer of splitmix64, a permutation of all 64-bit numbers for each salt."""
    mixed = values + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def choose_rows_per_band(settings: DedupConfig) -> int:
    """The most rows per band for which pairs at the threshold share a band with a probability of MIN_RECALL."""
    for rows in range(settings.permutations, 0, -1):
        bands = settings.permutations // rows
        if 1 - (1 - settings.threshold**rows) ** bands >= MIN_RECALL:
            return rows
    return 1


class MinHasher:
    """Computes the signatures of batches of texts."""

    def __init__(self, settings: DedupConfig) -> None:
        """Raises UsageError if rensa is not installed."""
        try:
            from rensa import RMinHash
        except ImportError:
            raise UsageError(
                'near deduplication needs the package rensa: pip install "fledge[data]", or near = false under [dedup]'
            ) from None
        self._digest = RMinHash.digest_matrix_from_flat_token_hashes
        self.settings = settings
        self.rows_per_band = choose_rows_per_band(settings)
        self.bands = settings.permutations // self.rows_per_band

    def compute_signatures(self, texts: Sequence[str]) -> tuple[Signatures, npt.NDArray[np.bool_]]:
        """(N, permutations) signatures of normalized texts, and (N,) whether each text has a shingle."""
        shingles, ends = hash_shingles(texts, self.settings.characters)
        offsets = np.concatenate([[0], ends]).astype(np.uint64)
        rows: Any = self._digest(shingles, offsets, self.settings.permutations, SEED).to_rows()
        return np.array(rows, dtype=np.uint32).reshape(len(texts), -1), np.diff(offsets) > 0

    def compute_band_hashes(self, signatures: Signatures) -> U64:
        """(N, bands) hashes of the bands. Two texts that share one are compared by their signatures."""
        used = signatures[:, : self.bands * self.rows_per_band].astype(np.uint64)
        used = used.reshape(-1, self.bands, self.rows_per_band)
        hashes = np.broadcast_to(np.arange(self.bands, dtype=np.uint64), used.shape[:2])
        for row in range(self.rows_per_band):
            hashes = mix_hashes(hashes ^ used[:, :, row], row)
        return hashes


def hash_shingles(texts: Sequence[str], width: int) -> tuple[U64, npt.NDArray[np.int64]]:
    """The hashes of the sampled shingles of all texts, concatenated, and the end of each text in this array.

    width: characters of a shingle.
    """
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    ends = np.cumsum(lengths)
    if len(codes) < width:
        return np.empty(0, np.uint64), np.zeros(len(texts), np.int64)
    hashes = mix_hashes(_hash_windows(codes, width), 0)
    is_sampled = hashes & np.uint64(SAMPLE_EVERY - 1) == 0
    for start, end in zip(ends - lengths, ends, strict=True):
        is_sampled[max(start, end - width + 1) : end] = False  # these windows extend into the next text
    positions = np.flatnonzero(is_sampled)
    return hashes[positions], np.searchsorted(positions, ends)


def _hash_windows(codes: U64, width: int) -> U64:
    """A polynomial hash of each window of `width` codes, combined from hashes of windows of 1, 2, 4, 8, ... codes."""
    factor = 0x9E3779B97F4A7C15
    hashes: U64 | None = None
    done, block, size = 0, codes + np.uint64(1), 1
    while True:
        if width & size:
            if hashes is None:
                hashes = block
            else:
                last = len(codes) - done - size + 1
                hashes = hashes[:last] * np.uint64(pow(factor, size, 1 << 64)) + block[done : done + last]
            done += size
        if done == width:
            assert hashes is not None
            return hashes
        step = len(block) - size
        block = block[:step] * np.uint64(pow(factor, size, 1 << 64)) + block[size : size + step]
        size *= 2


def estimate_similarity(one: Signatures, other: Signatures) -> npt.NDArray[np.float64]:
    """The estimated Jaccard similarity of the shingles, for each row."""
    return np.asarray((one == other).mean(axis=1))
