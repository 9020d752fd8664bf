"""Deduplication: copies, then near copies. Memory does not grow with the corpus, only the number of partitions does.

A partition is a range of hash values: whatever is equal falls into the same one, from whichever shard it comes. Of
equal documents the one of lowest rank survives (split.py). Near copies are found by locality-sensitive hashing:
documents that share a band are compared by their whole signatures, and one goes if a document of lower rank is as
similar as the threshold asks. So a document goes only for one that it resembles itself, never for a neighbor's
neighbor, and which goes depends on the order of reading alone, not on that of workers.

Here: the two stage functions and what they found. Not here: signatures (signature.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.data.pipeline.dedup.minhash import U64, Signatures, similarity
from fledge.data.pipeline.shards import Shard, shards
from fledge.data.pipeline.stage_outputs import StageContext, load_array, save_array
from fledge.data.pipeline.validation_split import candidates, ranks

RECORDS = 1_000_000  # in one partition: some 100 MB of memory
PAIRS = 8192  # of signatures that are compared at a time


@dataclass(frozen=True)
class HashPartition:
    """Hashes from `number` to `number` + 1, of `of` equal parts of all."""

    number: int
    of: int
    bounds: dict[str, int]  # the limits of split.py

    @property
    def name(self) -> str:
        """Of the file with what it found."""
        return f"{self.number:09}.npy"

    @property
    def range(self) -> tuple[int, int]:
        """First and last hash."""
        return (self.number << 64) // self.of, ((self.number + 1 << 64) // self.of) - 1


def partitions(records: int, bounds: dict[str, int]) -> list[HashPartition]:
    """As many as keep each within RECORDS."""
    count = -(-records // RECORDS) or 1
    return [HashPartition(number, count, bounds) for number in range(count)]


def find_copies(job: StageContext, partition: HashPartition) -> None:
    """Leave behind which documents of a partition are copies."""
    low, high = partition.range
    found: list[tuple[U64, U64, U64, U64]] = []
    for shard in shards(job):
        documents = shard.documents
        inside = np.flatnonzero((documents["hash"] >= np.uint64(low)) & (documents["hash"] <= np.uint64(high)))
        ids = shard.ids(inside)
        aside = candidates(shard, partition.bounds, job.config.seed)[inside]
        found.append((documents["hash"][inside], documents["hash2"][inside], ranks(ids, aside), ids))
    first, second, rank, ids = (np.concatenate(column) for column in zip(*found, strict=True))
    by = np.lexsort((rank, second, first))
    first, second, ids = first[by], second[by], ids[by]
    copy = np.zeros(len(ids), dtype=bool)
    copy[1:] = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
    _leave(job, "copies", partition, ids[copy])


def find_near_copies(job: StageContext, partition: HashPartition) -> None:
    """Leave behind which documents of a partition are too similar to another one of lower rank."""
    low, high = partition.range
    everything = shards(job)
    found: list[tuple[U64, U64, U64]] = []
    for shard in everything:
        bands = shard.bands
        start = np.searchsorted(bands["hash"], np.uint64(low))
        end = np.searchsorted(bands["hash"], np.uint64(high), side="right")
        inside = bands[start:end]
        inside = inside[~dropped(job, "copies", shard)[inside["document"]]]
        ids = shard.ids(inside["document"])
        aside = candidates(shard, partition.bounds, job.config.seed)[inside["document"]]
        found.append((inside["hash"], ranks(ids, aside), ids))
    hashes, rank, ids = (np.concatenate(column) for column in zip(*found, strict=True))
    by = np.lexsort((rank, hashes))
    gone = [
        late[similarity(_signatures(everything, early), _signatures(everything, late)) >= job.config.dedup.threshold]
        for early, late in _pairs(hashes[by], ids[by])
    ]
    _leave(job, "near", partition, np.unique(np.concatenate([*gone, np.empty(0, np.uint64)])))


def _pairs(hashes: U64, ids: U64) -> Iterator[tuple[U64, U64]]:
    """(lower, higher) documents that share a band, PAIRS at a time: each with its group's first and its neighbor."""
    same = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    if not len(same):
        return
    new_group = np.concatenate([[True], hashes[1:] != hashes[:-1]])
    first = np.maximum.accumulate(np.where(new_group, np.arange(len(hashes)), 0))
    early = np.concatenate([ids[first[same]], ids[same - 1]])
    pairs = np.unique(np.stack([early, np.concatenate([ids[same], ids[same]])], axis=1), axis=0)
    for start in range(0, len(pairs), PAIRS):
        block = pairs[start : start + PAIRS]
        yield block[:, 0], block[:, 1]


def _signatures(everything: list[Shard], ids: U64) -> Signatures:
    """The signatures of documents from anywhere."""
    numbers = (ids >> np.uint64(32)).astype(np.int64)
    found: Signatures | None = None
    for number in np.unique(numbers):
        here = np.flatnonzero(numbers == number)
        rows = everything[number].signatures[(ids[here] & np.uint64(0xFFFFFFFF)).astype(np.int64)]
        if found is None:
            found = np.empty((len(ids), rows.shape[1]), dtype=np.uint32)
        found[here] = rows
    assert found is not None
    return found


def _leave(job: StageContext, stage: str, partition: HashPartition, ids: npt.NDArray[Any]) -> None:
    save_array(job.folder(stage) / partition.name, np.sort(ids).astype(np.uint64))


def dropped(job: StageContext, stage: str, shard: Shard) -> npt.NDArray[np.bool_]:
    """Which documents of a shard a finished stage drops; none where it was not asked for."""
    mask = np.zeros(len(shard.documents), dtype=bool)
    low, high = np.uint64(shard.number << 32), np.uint64(shard.number + 1 << 32)
    for ids in _found(job.folder(stage)) if stage in job.keys else ():
        start, end = np.searchsorted(ids, low), np.searchsorted(ids, high)
        mask[(ids[start:end] & np.uint64(0xFFFFFFFF)).astype(np.int64)] = True
    return mask


@lru_cache(maxsize=4)
def _found(folder: Path) -> list[npt.NDArray[Any]]:
    return [load_array(path) for path in sorted(folder.glob("[0-9]*.npy"))]
