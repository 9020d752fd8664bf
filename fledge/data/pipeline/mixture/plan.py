"""Plan which documents a store contains, and how often: convert caps, weights and epochs to one limit for each group.

Every part of a document has a position in an order that depends only on its hash and the seed. Bytes are counted by
group and by bucket of that order, and a group takes the buckets below its limit. The plan therefore needs no list of
documents, is the same for any number of workers, and is exact to one bucket, 1/16384 of a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.core.errors import UsageError
from fledge.data.pipeline.config import MixtureConfig, MixtureGroup
from fledge.data.pipeline.dedup.duplicates import load_dropped
from fledge.data.pipeline.dedup.minhash import mix_hashes
from fledge.data.pipeline.mixture.groups import Kind, find_group, list_remarks
from fledge.data.pipeline.shards import Shard, list_shards
from fledge.data.pipeline.stage_outputs import StageContext
from fledge.data.pipeline.validation_split import compute_max_held_out, compute_sort_keys, find_candidates

BUCKET_BITS = 14
BUCKETS = 1 << BUCKET_BITS
SALT = 2
PART_STEP = np.uint64(0xD1342543DE82EF95)  # any odd number; it gives each part of a document its own position

ASSIGNMENTS = ("train", "copies", "near copies", "validation", "no group", "left out")  # stages in the counts
TRAIN, EXACT_DUPLICATE, NEAR_DUPLICATE, HELD_OUT, NO_GROUP, UNUSED = range(len(ASSIGNMENTS))
DROP_REASONS = {
    EXACT_DUPLICATE: "exact duplicates",
    NEAR_DUPLICATE: "near duplicates",
    HELD_OUT: "held out for validation",
    NO_GROUP: "in no group of the mixture",
    UNUSED: "over the limits of the mixture",
}


@dataclass(frozen=True)
class GroupShare:
    """The share of a group: every part `full` times, and the parts below `limit` once more."""

    full: int = 0
    limit: int = BUCKETS


@dataclass(frozen=True)
class MixturePlan:
    """The plan for a corpus."""

    mixture: MixtureConfig
    seed: int
    held_out: dict[int, dict[int, int]] = field(default_factory=dict)  # shard -> validation document -> bytes used
    shares: tuple[GroupShare, ...] = ()  # for each group; empty: every part is used once
    source_limits: dict[tuple[int, str], int] = field(default_factory=dict)  # (group, source) -> limit
    remarks: tuple[str, ...] = ()  # notes about the config

    def for_shard(self, shard: Shard) -> MixturePlan:
        """The plan with the held-out documents of one shard only."""
        held_out = {shard.number: self.held_out[shard.number]} if shard.number in self.held_out else {}
        return MixturePlan(self.mixture, self.seed, held_out, self.shares, self.source_limits)


@dataclass(frozen=True)
class MixtureAssignment:
    """The assignment of each part of a shard."""

    codes: npt.NDArray[np.uint8]  # index into ASSIGNMENTS
    times: npt.NDArray[np.int64]  # how often the part is used for training
    groups: npt.NDArray[np.int64]  # index into the groups, or -1
    buckets: npt.NDArray[np.int64]  # position in the order


def assign_parts(context: StageContext, shard: Shard, plan: MixturePlan) -> MixtureAssignment:
    """Apply a plan to a shard."""
    parts = shard.parts
    document = parts["document"]
    kind_groups = np.array([find_group(plan.mixture, *kind) for kind in shard.kinds], dtype=np.int64)
    groups = kind_groups[parts["kind"]]
    hashes = shard.documents["hash"][document] + parts["part"].astype(np.uint64) * PART_STEP
    positions = mix_hashes(hashes, SALT + 2 * plan.seed)
    buckets = (positions >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
    shares = plan.shares or (GroupShare(),) * len(plan.mixture.groups)
    full = np.array([share.full for share in shares] or [0])
    limit = np.array([share.limit for share in shares] or [0])
    times = full[groups] + (buckets < limit[groups])
    sources = [source for _, source in shard.kinds]
    source_limit = np.array(
        [plan.source_limits.get(key, BUCKETS) for key in zip(kind_groups.tolist(), sources, strict=True)]
    )
    times[buckets >= source_limit[parts["kind"]]] = 0
    codes = np.where(times == 0, UNUSED, TRAIN).astype(np.uint8)
    codes[groups < 0] = NO_GROUP
    held_out = np.zeros(len(shard.documents), dtype=bool)
    held_out[list(plan.held_out.get(shard.number, ()))] = True
    codes[held_out[document]] = HELD_OUT
    codes[load_dropped(context, "near", shard)[document]] = NEAR_DUPLICATE
    codes[load_dropped(context, "copies", shard)[document]] = EXACT_DUPLICATE
    return MixtureAssignment(codes, np.where(codes == TRAIN, times, 0), groups, buckets)


def make_plan(context: StageContext, hash_limits: dict[str, int]) -> MixturePlan:
    """The plan of a corpus whose shards are deduplicated. Raises UsageError if no training document remains."""
    mixture = context.config.mixture
    plan = MixturePlan(mixture, context.config.seed, _choose_held_out(context, hash_limits))
    if mixture.source_bytes:
        plan = MixturePlan(mixture, plan.seed, plan.held_out, source_limits=_compute_source_limits(context, plan))
    sizes = np.zeros((len(mixture.groups), BUCKETS), dtype=np.int64)
    documents = np.zeros(len(ASSIGNMENTS), dtype=np.int64)
    kinds: set[Kind] = set()
    for shard, assignment in _assign_all(context, plan):
        taken = assignment.codes == TRAIN
        part_bytes = shard.parts["size"][taken].astype(np.int64)
        np.add.at(sizes, (assignment.groups[taken], assignment.buckets[taken]), part_bytes)
        documents += np.bincount(assignment.codes[shard.parts["part"] == 0], minlength=len(ASSIGNMENTS))
        kinds.update(shard.kinds)
    available = sizes.sum(axis=1)
    notes = tuple(list_remarks(mixture, sorted(kinds), available.tolist()))
    _check_weights(mixture, available, notes)
    wanted = _compute_wanted_bytes(mixture, available)
    shares = tuple(_compute_share(group_bytes, row) for group_bytes, row in zip(wanted, sizes, strict=True))
    if not any(share.full or share.limit for share in shares):
        raise _make_empty_error(documents, notes)
    if not plan.held_out and context.config.validation.is_enabled:
        notes += ("no document is held out for validation: too few of each language; see validation.share",)
    return MixturePlan(mixture, plan.seed, plan.held_out, shares, plan.source_limits, notes)


def _check_weights(mixture: MixtureConfig, available: npt.NDArray[Any], notes: tuple[str, ...]) -> None:
    """Raises UsageError for a weighted group without documents: all other weighted groups would be empty too."""
    for group, size in zip(mixture.groups, available, strict=True):
        if group.weight and not size:
            prefix = f"group {group.name} of the mixture"
            reasons = [note.partition(": ")[2] for note in notes if note.startswith(f"{prefix}: ")]
            raise UsageError(f"{prefix} has a weight, but no document: {reasons[0]}")


def _make_empty_error(documents: npt.NDArray[Any], notes: tuple[str, ...]) -> UsageError:
    documents[UNUSED] += documents[TRAIN]  # documents of groups whose share is empty
    counts = ", ".join(f"{documents[code]:,} are {reason}" for code, reason in DROP_REASONS.items() if documents[code])
    return UsageError("; ".join((f"no document remains for training: {counts}", *notes[:3])))


def _assign_all(context: StageContext, plan: MixturePlan) -> Iterator[tuple[Shard, MixtureAssignment]]:
    for shard in list_shards(context):
        yield shard, assign_parts(context, shard, plan)


def _choose_held_out(context: StageContext, hash_limits: dict[str, int]) -> dict[int, dict[int, int]]:
    """The validation documents: shard -> document -> bytes used.

    Candidates are taken in their hash order up to the byte limit of each language. `compute_max_held_out` limits their
    number in each language and group.
    """
    settings = context.config.validation
    # language -> (position, shard, document, bytes, group) of each candidate
    candidates: dict[str, list[tuple[int, int, int, int, int]]] = {}
    available = Counter[tuple[str, int]]()  # (language, group) -> documents
    for shard in list_shards(context):
        is_unique = ~(load_dropped(context, "copies", shard) | load_dropped(context, "near", shard))
        documents = shard.documents
        languages = [language for language, _ in shard.kinds]
        groups = [find_group(context.config.mixture, *kind) for kind in shard.kinds]
        for kind, number in enumerate(np.bincount(documents["kind"][is_unique], minlength=len(groups)).tolist()):
            available[languages[kind], groups[kind]] += number
        for number in np.flatnonzero(is_unique & find_candidates(shard, hash_limits, context.config.seed)).tolist():
            document = documents[number]
            language, group = languages[document["kind"]], groups[document["kind"]]
            if group >= 0:
                position = int(compute_sort_keys(document["hash"].reshape(1), context.config.seed)[0])
                candidate = (position, shard.number, number, int(document["bytes"]), group)
                candidates.setdefault(language, []).append(candidate)
    chosen: dict[int, dict[int, int]] = {}
    for language, in_language in sorted(candidates.items()):
        bytes_left = settings.bytes
        documents_left = {
            group: compute_max_held_out(available[language, group], settings) for *_, group in in_language
        }
        for _, shard_number, number, size, group in sorted(in_language):
            taken = min(size, settings.bytes // 4, bytes_left)
            if taken > 0 and documents_left[group] > 0:
                chosen.setdefault(shard_number, {})[number] = taken
                bytes_left -= taken
                documents_left[group] -= 1
    return chosen


def _compute_source_limits(context: StageContext, plan: MixturePlan) -> dict[tuple[int, str], int]:
    """(group, source) -> the bucket limit below which the parts of the source fill its cap."""
    caps = plan.mixture.source_bytes
    sizes: dict[tuple[int, str], npt.NDArray[np.int64]] = {}
    for shard, assignment in _assign_all(context, plan):
        parts = shard.parts
        for kind, (_, source) in enumerate(shard.kinds):
            if source not in caps:
                continue
            taken = (assignment.codes == TRAIN) & (parts["kind"] == kind)
            if taken.any():
                key = (int(assignment.groups[taken][0]), source)
                row = sizes.setdefault(key, np.zeros(BUCKETS, dtype=np.int64))
                np.add.at(row, assignment.buckets[taken], parts["size"][taken].astype(np.int64))
    return {key: _find_bucket_limit(row, caps[key[1]]) for key, row in sizes.items()}


def _compute_wanted_bytes(mixture: MixtureConfig, available: npt.NDArray[Any]) -> list[float]:
    """The bytes to take from each group. available: the bytes of each group."""
    limits = [_compute_max_bytes(group, int(size)) for group, size in zip(mixture.groups, available, strict=True)]
    weights = sum(group.weight for group in mixture.groups)
    if not weights:
        return limits
    groups = list(zip(mixture.groups, limits, strict=True))
    total = min(limit * weights / group.weight for group, limit in groups if group.weight)
    if mixture.total_bytes:
        total = min(total, mixture.total_bytes)
    return [total * group.weight / weights if group.weight else limit for group, limit in groups]


def _compute_max_bytes(group: MixtureGroup, available: int) -> float:
    max_bytes = group.epochs * available
    return min(max_bytes, group.max_bytes) if group.max_bytes else max_bytes


def _compute_share(wanted: float, sizes: npt.NDArray[np.int64]) -> GroupShare:
    """The share that gives `wanted` bytes. sizes: (BUCKETS,) bytes of the group."""
    available = int(sizes.sum())
    if not available:
        return GroupShare(0, 0)
    full, rest = divmod(wanted, available)
    return GroupShare(int(full), _find_bucket_limit(sizes, rest))


def _find_bucket_limit(sizes: npt.NDArray[np.int64], wanted: float) -> int:
    """The lowest limit below which the buckets have at least `wanted` bytes; 0 if `wanted` is 0."""
    if wanted <= 0:
        return 0
    return min(int(np.searchsorted(np.cumsum(sizes), wanted)) + 1, BUCKETS)
