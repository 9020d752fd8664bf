"""Choose the candidates for validation: documents whose hash is below a limit for their language.

Exact duplicates have the same hash, so all of them are candidates or none. Near duplicates have different hashes; if
one of them is a candidate, deduplication drops the others. mixture/plan.py chooses the validation documents from the
candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.data.pipeline.config import ValidationConfig
from fledge.data.pipeline.counts import Counts
from fledge.data.pipeline.dedup.minhash import U64, mix_hashes
from fledge.data.pipeline.shards import Shard

SALT = 1
CANDIDATE_FACTOR = 4  # bytes of candidates relative to the bytes wanted, because document sizes vary
HASH_RANGE = 1 << 64
TRAINING_BIT = np.uint64(1 << 63)


def compute_hash_limits(counts: Counts, settings: ValidationConfig) -> dict[str, int]:
    """language -> the limit of the hashes (below 2**64) of its candidates."""
    hash_limits = {}
    for language, count in counts.group_by("language").get("clean", {}).items():
        share = max(settings.share, settings.documents / count.documents) if settings.is_enabled else 0
        mean = min(count.bytes / count.documents, settings.bytes / 4)
        enough = max(settings.documents, CANDIDATE_FACTOR * settings.bytes / max(mean, 1)) / count.documents
        hash_limits[language] = min(int(min(share, enough) * HASH_RANGE), HASH_RANGE - 1)
    return hash_limits


def compute_max_held_out(documents: int, settings: ValidationConfig) -> int:
    """The largest number of documents of a language that may be held out. At least one remains for training.

    documents: the number of documents of the language, without duplicates. The result is half of them, or
    `settings.share` of them if that is more; otherwise chance could select all. It is a quarter of them if the minimum
    `settings.documents` is larger than the share, as in small corpora.
    """
    share = int(settings.share * documents)
    return max(min(documents - 1, max(share, documents // (2 if share >= settings.documents else 4))), 0)


def find_candidates(shard: Shard, hash_limits: dict[str, int], seed: int) -> npt.NDArray[np.bool_]:
    """(documents,) mask of the documents of a shard that may be validation documents."""
    documents = shard.documents
    kind_limits = np.array([hash_limits.get(language, 0) for language, _ in shard.kinds], dtype=np.uint64)
    return compute_sort_keys(documents["hash"], seed) < kind_limits[documents["kind"]]


def compute_sort_keys(hashes: npt.NDArray[Any], seed: int) -> U64:
    """The sort keys of documents by which they are chosen for validation."""
    return mix_hashes(np.asarray(hashes, dtype=np.uint64) ^ np.uint64(seed & (HASH_RANGE - 1)), SALT)


def rank_documents(ids: U64, is_candidate: npt.NDArray[np.bool_]) -> U64:
    """The ranks of documents. Of duplicates, the lowest rank is kept: candidates first, then in reading order."""
    return np.where(is_candidate, ids, ids | TRAINING_BIT)
