"""Find exact and near duplicates. Memory use does not depend on the corpus, only the number of partitions does.

A partition is a range of hash values, so equal documents of all shards are in one partition. Of equal documents, the
one with the lowest rank is kept (validation_split.py). Near duplicates are found by locality-sensitive hashing:
documents that share a band are compared by their full signatures. A document is dropped if its similarity to a document
of lower rank reaches the threshold. It is never dropped because both resemble a third document, and the result depends
only on the reading order, not on the workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.data.pipeline.dedup.minhash import U64, Signatures, estimate_similarity
from fledge.data.pipeline.shards import Shard, list_shards
from fledge.data.pipeline.stage_outputs import StageContext, load_array, save_array
from fledge.data.pipeline.validation_split import find_candidates, rank_documents

PARTITION_RECORDS = 1_000_000  # records of one partition, about 100 MB of memory
BATCH_PAIRS = 8192  # pairs of signatures that are compared at once


@dataclass(frozen=True)
class HashPartition:
    """The hashes of partition `number` of `count` equal partitions."""

    number: int
    count: int
    hash_limits: dict[str, int]  # language -> limit, see validation_split.py

    @property
    def name(self) -> str:
        """The file name of its output."""
        return f"{self.number:09}.npy"

    @property
    def range(self) -> tuple[int, int]:
        """First and last hash."""
        return (self.number << 64) // self.count, ((self.number + 1 << 64) // self.count) - 1


def make_partitions(records: int, hash_limits: dict[str, int]) -> list[HashPartition]:
    """As many partitions as are needed for at most PARTITION_RECORDS records in each."""
    count = -(-records // PARTITION_RECORDS) or 1
    return [HashPartition(number, count, hash_limits) for number in range(count)]


def find_exact_duplicates(context: StageContext, partition: HashPartition) -> None:
    """Stage function: write the ids of the exact duplicates in a partition."""
    low, high = partition.range
    columns: list[tuple[U64, U64, U64, U64]] = []
    for shard in list_shards(context):
        documents = shard.documents
        inside = np.flatnonzero((documents["hash"] >= np.uint64(low)) & (documents["hash"] <= np.uint64(high)))
        ids = shard.global_ids(inside)
        is_candidate = find_candidates(shard, partition.hash_limits, context.config.seed)[inside]
        ranks = rank_documents(ids, is_candidate)
        columns.append((documents["hash"][inside], documents["hash2"][inside], ranks, ids))
    first, second, rank, ids = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((rank, second, first))
    first, second, ids = first[order], second[order], ids[order]
    is_duplicate = np.zeros(len(ids), dtype=bool)
    is_duplicate[1:] = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
    _save_ids(context, "copies", partition, ids[is_duplicate])


def find_near_duplicates(context: StageContext, partition: HashPartition) -> None:
    """Stage function: write the ids of the documents in a partition that resemble one of lower rank."""
    low, high = partition.range
    shards = list_shards(context)
    columns: list[tuple[U64, U64, U64]] = []
    for shard in shards:
        bands = shard.bands
        start = np.searchsorted(bands["hash"], np.uint64(low))
        end = np.searchsorted(bands["hash"], np.uint64(high), side="right")
        inside = bands[start:end]
        inside = inside[~load_dropped(context, "copies", shard)[inside["document"]]]
        ids = shard.global_ids(inside["document"])
        is_candidate = find_candidates(shard, partition.hash_limits, context.config.seed)[inside["document"]]
        columns.append((inside["hash"], rank_documents(ids, is_candidate), ids))
    hashes, rank, ids = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((rank, hashes))
    dropped = [np.empty(0, np.uint64)]
    for early, late in _pair_documents(hashes[order], ids[order]):
        similarity = estimate_similarity(_load_signatures(shards, early), _load_signatures(shards, late))
        dropped.append(late[similarity >= context.config.dedup.threshold])
    _save_ids(context, "near", partition, np.unique(np.concatenate(dropped)))


def _pair_documents(hashes: U64, ids: U64) -> Iterator[tuple[U64, U64]]:
    """(lower, higher) ids of documents that share a band, in batches of BATCH_PAIRS.

    Each document is paired with the first document of its band and with the one before it.
    """
    same = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    if not len(same):
        return
    is_new_band = np.concatenate([[True], hashes[1:] != hashes[:-1]])
    first = np.maximum.accumulate(np.where(is_new_band, np.arange(len(hashes)), 0))
    early = np.concatenate([ids[first[same]], ids[same - 1]])
    pairs = np.unique(np.stack([early, np.concatenate([ids[same], ids[same]])], axis=1), axis=0)
    for start in range(0, len(pairs), BATCH_PAIRS):
        batch = pairs[start : start + BATCH_PAIRS]
        yield batch[:, 0], batch[:, 1]


def _load_signatures(shards: list[Shard], ids: U64) -> Signatures:
    """(ids, permutations) signatures of documents of any shard."""
    numbers = (ids >> np.uint64(32)).astype(np.int64)
    signatures: Signatures | None = None
    for number in np.unique(numbers):
        positions = np.flatnonzero(numbers == number)
        rows = shards[number].signatures[(ids[positions] & np.uint64(0xFFFFFFFF)).astype(np.int64)]
        if signatures is None:
            signatures = np.empty((len(ids), rows.shape[1]), dtype=np.uint32)
        signatures[positions] = rows
    assert signatures is not None
    return signatures


def _save_ids(context: StageContext, stage: str, partition: HashPartition, ids: npt.NDArray[Any]) -> None:
    save_array(context.folder(stage) / partition.name, np.sort(ids).astype(np.uint64))


def load_dropped(context: StageContext, stage: str, shard: Shard) -> npt.NDArray[np.bool_]:
    """(documents,) mask of the documents of a shard that a finished stage drops. All False if the stage is not run."""
    mask = np.zeros(len(shard.documents), dtype=bool)
    low, high = np.uint64(shard.number << 32), np.uint64(shard.number + 1 << 32)
    for ids in _load_ids(context.folder(stage)) if stage in context.keys else ():
        start, end = np.searchsorted(ids, low), np.searchsorted(ids, high)
        mask[(ids[start:end] & np.uint64(0xFFFFFFFF)).astype(np.int64)] = True
    return mask


@lru_cache(maxsize=4)
def _load_ids(folder: Path) -> list[npt.NDArray[Any]]:
    return [load_array(path) for path in sorted(folder.glob("[0-9]*.npy"))]
