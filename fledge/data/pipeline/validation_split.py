"""Which documents may be kept aside for validation: those whose own hash is below a limit for their language.

A copy has the same hash, so copies are always on the same side. Near copies are not; where one of two near copies is
for validation, deduplication drops the other one. Here: the limits, and the order in which copies survive. Not here:
how many candidates are taken in the end (plan.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.data.pipeline.config import ValidationConfig
from fledge.data.pipeline.counts import Counts
from fledge.data.pipeline.dedup.minhash import U64, mixed
from fledge.data.pipeline.shards import Shard

SALT = 1
ROOM = 4  # times as many bytes of candidates as are wanted, because sizes vary
WHOLE = 1 << 64
LATER = np.uint64(1 << 63)


def limits(counts: Counts, settings: ValidationConfig) -> dict[str, int]:
    """language -> the limit of hashes, of 2**64. The rest of a language's candidates go back to training."""
    found = {}
    for language, count in counts.group_by("language").get("clean", {}).items():
        share = max(settings.share, settings.documents / count.documents) if settings.wanted else 0
        mean = min(count.bytes / count.documents, settings.bytes / 4)
        enough = max(settings.documents, ROOM * settings.bytes / max(mean, 1)) / count.documents
        found[language] = min(int(min(share, enough) * WHOLE), WHOLE - 1)
    return found


def most_aside(documents: int, settings: ValidationConfig) -> int:
    """The largest number of documents of a language that may be held out, without duplicates. One always remains.

    That is half of them, or the share where it is more: chance, or copies of what is aside, could ask for all. Where
    the least number decides, as in small corpora, it is a quarter.
    """
    share = int(settings.share * documents)
    return max(min(documents - 1, max(share, documents // (2 if share >= settings.documents else 4))), 0)


def candidates(shard: Shard, bounds: dict[str, int], seed: int) -> npt.NDArray[np.bool_]:
    """Which documents of a shard may be validation documents."""
    documents = shard.documents
    of_kind = np.array([bounds.get(language, 0) for language, _ in shard.kinds], dtype=np.uint64)
    return order(documents["hash"], seed) < of_kind[documents["kind"]]


def order(hashes: npt.NDArray[Any], seed: int) -> U64:
    """The order in which documents are taken for validation."""
    return mixed(np.asarray(hashes, dtype=np.uint64) ^ np.uint64(seed & (WHOLE - 1)), SALT)


def ranks(ids: U64, aside: npt.NDArray[np.bool_]) -> U64:
    """Of equal or similar documents that with the lowest rank survives: validation first, then as they were read."""
    return np.where(aside, ids, ids | LATER)
