"""Which documents a store holds, and how often: caps, weights and epochs turned into one limit a group.

Every part of a document has a place in an order that depends on its own hash and the seed alone. Bytes are counted by
group and by bucket of that order, and a group takes the buckets below a limit. So the choice needs no list of
documents, is the same for any number of workers, and is exact to one bucket, 1/16384 of a group.

Here: the limits, and what they say about each part of a shard. Not here: reading any text.
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
from fledge.data.pipeline.dedup.duplicates import dropped
from fledge.data.pipeline.dedup.minhash import mixed
from fledge.data.pipeline.mixture.groups import Kind, group_of, remarks
from fledge.data.pipeline.shards import Shard, shards
from fledge.data.pipeline.stage_outputs import StageContext
from fledge.data.pipeline.validation_split import candidates, most_aside, order

BUCKET_BITS = 14
BUCKETS = 1 << BUCKET_BITS
SALT = 2
PART_STEP = np.uint64(0xD1342543DE82EF95)  # any odd number: parts of one document have places of their own

VERDICTS = ("train", "copies", "near copies", "validation", "no group", "left out")
TRAIN, COPY, NEAR, ASIDE, NO_GROUP, LEFT_OUT = range(len(VERDICTS))
GONE = {
    COPY: "copies of others",
    NEAR: "near copies of others",
    ASIDE: "kept aside for validation",
    NO_GROUP: "in no group of the mixture",
    LEFT_OUT: "left out by its limits",
}


@dataclass(frozen=True)
class GroupShare:
    """What a group takes: every part `full` times, and those below `limit` once more."""

    full: int = 0
    limit: int = BUCKETS


@dataclass(frozen=True)
class MixturePlan:
    """The choice for a whole corpus."""

    mixture: MixtureConfig
    seed: int
    aside: dict[int, dict[int, int]] = field(default_factory=dict)  # shard -> validation document -> bytes of it
    shares: tuple[GroupShare, ...] = ()  # of each group; before they are known, everything is taken once
    source_limits: dict[tuple[int, str], int] = field(default_factory=dict)  # (group, source) -> limit
    remarks: tuple[str, ...] = ()  # notes for the author of the config

    def for_shard(self, shard: Shard) -> MixturePlan:
        """What one shard's task needs of it."""
        aside = {shard.number: self.aside[shard.number]} if shard.number in self.aside else {}
        return MixturePlan(self.mixture, self.seed, aside, self.shares, self.source_limits)


@dataclass(frozen=True)
class MixtureAssignment:
    """What happens to each part of a shard."""

    codes: npt.NDArray[np.uint8]  # index into VERDICTS
    times: npt.NDArray[np.int64]  # how often it is trained on
    groups: npt.NDArray[np.int64]  # index into the groups, or -1
    buckets: npt.NDArray[np.int64]  # its place in the order


def judge(job: StageContext, shard: Shard, plan: MixturePlan) -> MixtureAssignment:
    """Apply a plan."""
    parts = shard.parts
    of = parts["document"]
    of_kind = np.array([group_of(plan.mixture, *kind) for kind in shard.kinds], dtype=np.int64)
    groups = of_kind[parts["kind"]]
    places = mixed(shard.documents["hash"][of] + parts["part"].astype(np.uint64) * PART_STEP, SALT + 2 * plan.seed)
    buckets = (places >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
    shares = plan.shares or (GroupShare(),) * len(plan.mixture.groups)
    full = np.array([share.full for share in shares] or [0])
    limit = np.array([share.limit for share in shares] or [0])
    times = full[groups] + (buckets < limit[groups])
    source_limit = np.array(
        [plan.source_limits.get((group, kind[1]), BUCKETS) for group, kind in zip(of_kind, shard.kinds, strict=True)]
    )
    times[buckets >= source_limit[parts["kind"]]] = 0
    codes = np.where(times == 0, LEFT_OUT, TRAIN).astype(np.uint8)
    codes[groups < 0] = NO_GROUP
    aside = np.zeros(len(shard.documents), dtype=bool)
    aside[list(plan.aside.get(shard.number, ()))] = True
    for code, mask in ((ASIDE, aside), (NEAR, dropped(job, "near", shard)), (COPY, dropped(job, "copies", shard))):
        codes[mask[of]] = code
    return MixtureAssignment(codes, np.where(codes == TRAIN, times, 0), groups, buckets)


def make_plan(job: StageContext, bounds: dict[str, int]) -> MixturePlan:
    """The plan of a corpus whose shards are there and deduplicated. Raises UsageError where it leaves nothing."""
    mixture = job.config.mixture
    plan = MixturePlan(mixture, job.config.seed, _aside(job, bounds))
    if mixture.source_bytes:
        plan = MixturePlan(mixture, plan.seed, plan.aside, source_limits=_source_limits(job, plan))
    sizes = np.zeros((len(mixture.groups), BUCKETS), dtype=np.int64)
    documents = np.zeros(len(VERDICTS), dtype=np.int64)
    kinds: set[Kind] = set()
    for shard, verdict in _judged(job, plan):
        taken = verdict.codes == TRAIN
        np.add.at(sizes, (verdict.groups[taken], verdict.buckets[taken]), shard.parts["size"][taken].astype(np.int64))
        documents += np.bincount(verdict.codes[shard.parts["part"] == 0], minlength=len(VERDICTS))
        kinds.update(shard.kinds)
    there = sizes.sum(axis=1)
    said = tuple(remarks(mixture, sorted(kinds), there.tolist()))
    _check_weights(mixture, there, said)
    shares = tuple(_share(wanted, row) for wanted, row in zip(_wanted(mixture, there), sizes, strict=True))
    if not any(share.full or share.limit for share in shares):
        raise _nothing_left(documents, said)
    if not plan.aside and job.config.validation.wanted:
        said += ("no document is kept aside for validation: too few of each language; see validation.share",)
    return MixturePlan(mixture, plan.seed, plan.aside, shares, plan.source_limits, said)


def _check_weights(mixture: MixtureConfig, there: npt.NDArray[Any], said: tuple[str, ...]) -> None:
    """Raises UsageError for a group with a weight and no document: all the others would be empty, too."""
    for group, size in zip(mixture.groups, there, strict=True):
        if group.weight and not size:
            why = [line.partition(": ")[2] for line in said if line.startswith(f"group {group.name} of the mixture: ")]
            raise UsageError(f"group {group.name} of the mixture has a weight, but no document: {why[0]}")


def _nothing_left(documents: npt.NDArray[Any], said: tuple[str, ...]) -> UsageError:
    documents[LEFT_OUT] += documents[TRAIN]  # of groups that take nothing
    where = ", ".join(f"{documents[code]:,} are {words}" for code, words in GONE.items() if documents[code])
    return UsageError("; ".join((f"no document is left for training: {where}", *said[:3])))


def _judged(job: StageContext, plan: MixturePlan) -> Iterator[tuple[Shard, MixtureAssignment]]:
    for shard in shards(job):
        yield shard, judge(job, shard, plan)


def _aside(job: StageContext, bounds: dict[str, int]) -> dict[int, dict[int, int]]:
    """The validation documents: candidates in their order, as many as the limit of bytes allows a language.

    Most documents of a language and group stay for training, however few there are.
    """
    settings = job.config.validation
    found: dict[str, list[tuple[int, int, int, int, int]]] = {}
    there = Counter[tuple[str, int]]()  # (language, group) -> documents
    for shard in shards(job):
        kept = ~(dropped(job, "copies", shard) | dropped(job, "near", shard))
        documents = shard.documents
        languages = [language for language, _ in shard.kinds]
        groups = [group_of(job.config.mixture, *kind) for kind in shard.kinds]
        for kind, number in enumerate(np.bincount(documents["kind"][kept], minlength=len(groups)).tolist()):
            there[languages[kind], groups[kind]] += number
        for number in np.flatnonzero(kept & candidates(shard, bounds, job.config.seed)).tolist():
            one = documents[number]
            language, group = languages[one["kind"]], groups[one["kind"]]
            if group >= 0:
                place = int(order(one["hash"].reshape(1), job.config.seed)[0])
                found.setdefault(language, []).append((place, shard.number, number, int(one["bytes"]), group))
    chosen: dict[int, dict[int, int]] = {}
    for language, in_language in sorted(found.items()):
        room = settings.bytes
        left = {group: most_aside(there[language, group], settings) for *_, group in in_language}
        for _, shard_number, number, size, group in sorted(in_language):
            taken = min(size, settings.bytes // 4, room)
            if taken > 0 and left[group] > 0:
                chosen.setdefault(shard_number, {})[number] = taken
                room -= taken
                left[group] -= 1
    return chosen


def _source_limits(job: StageContext, plan: MixturePlan) -> dict[tuple[int, str], int]:
    """(group, source) -> the bucket below which the source's parts fill its cap."""
    caps = plan.mixture.source_bytes
    sizes: dict[tuple[int, str], npt.NDArray[np.int64]] = {}
    for shard, verdict in _judged(job, plan):
        parts = shard.parts
        for kind, (_, source) in enumerate(shard.kinds):
            if source not in caps:
                continue
            taken = (verdict.codes == TRAIN) & (parts["kind"] == kind)
            if taken.any():
                key = (int(verdict.groups[taken][0]), source)
                row = sizes.setdefault(key, np.zeros(BUCKETS, dtype=np.int64))
                np.add.at(row, verdict.buckets[taken], parts["size"][taken].astype(np.int64))
    return {key: _limit(row, caps[key[1]]) for key, row in sizes.items()}


def _wanted(mixture: MixtureConfig, there: npt.NDArray[Any]) -> list[float]:
    """Bytes to take of each group."""
    most = [_most(group, int(size)) for group, size in zip(mixture.groups, there, strict=True)]
    weights = sum(group.weight for group in mixture.groups)
    if not weights:
        return most
    whole = min(one * weights / group.weight for one, group in zip(most, mixture.groups, strict=True) if group.weight)
    if mixture.total_bytes:
        whole = min(whole, mixture.total_bytes)
    return [
        whole * group.weight / weights if group.weight else one for one, group in zip(most, mixture.groups, strict=True)
    ]


def _most(group: MixtureGroup, there: int) -> float:
    most = group.epochs * there
    return min(most, group.max_bytes) if group.max_bytes else most


def _share(wanted: float, sizes: npt.NDArray[np.int64]) -> GroupShare:
    there = int(sizes.sum())
    if not there:
        return GroupShare(0, 0)
    full, rest = divmod(wanted, there)
    return GroupShare(int(full), _limit(sizes, rest))


def _limit(sizes: npt.NDArray[np.int64], wanted: float) -> int:
    """The first limit below which there are `wanted` bytes; 0 for none."""
    if wanted <= 0:
        return 0
    return min(int(np.searchsorted(np.cumsum(sizes), wanted)) + 1, BUCKETS)
