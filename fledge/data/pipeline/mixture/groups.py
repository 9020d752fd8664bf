"""Which group of the mixture a document belongs to, and what its user should hear: names that fit nothing.

Here: patterns against languages and sources, and the words about them. Not here: how much is taken (plan.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from fledge.data.pipeline.config import MixtureConfig, MixtureGroup

NAMES = 8  # of languages or sources that a message lists

Kind = tuple[str, str]
"""(language, source) of a document."""


def group_of(mixture: MixtureConfig, language: str, source: str) -> int:
    """The number of the first group that fits, or -1."""
    for number, group in enumerate(mixture.groups):
        if _fits(group, (language, source)):
            return number
    return -1


def _fits(group: MixtureGroup, kind: Kind) -> bool:
    return all(_any(name, patterns) for name, patterns in zip(kind, (group.languages, group.sources), strict=True))


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def remarks(mixture: MixtureConfig, kinds: Sequence[Kind], sizes: Sequence[int]) -> Iterator[str]:
    """A line for each name of the mixture that fits nothing, and for documents that no group wants.

    kinds: all there are after cleaning, in any order. sizes: bytes that each group can take.
    """
    for group, size in zip(mixture.groups, sizes, strict=True):
        lines = list(_unmatched(group, kinds))
        if not size and not lines:
            lines = [_why_empty(group, mixture, kinds)]
        yield from (f"group {group.name} of the mixture: {line}" for line in lines)
    sources = {source for _, source in kinds}
    for name in mixture.source_bytes:
        if name not in sources:
            yield f"mixture.source_bytes: no document has the source {name!r}; there are {_listed(sources)}"
    lost = sorted(kind for kind in kinds if group_of(mixture, *kind) < 0)
    if lost:
        language, source = lost[0]
        yield f"documents without a group of the mixture are left out: language {language!r}, source {source!r}" + (
            f", and {len(lost) - 1} more such pairs" if lost[1:] else ""
        )


def _unmatched(group: MixtureGroup, kinds: Sequence[Kind]) -> Iterator[str]:
    pick: dict[str, tuple[tuple[str, ...], Callable[[Kind], str]]] = {
        "language": (group.languages, lambda kind: kind[0]),
        "source": (group.sources, lambda kind: kind[1]),
    }
    for column, (patterns, of) in pick.items():
        there = {of(kind) for kind in kinds}
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in there):
                yield f"no document has the {column} {pattern!r}; there are {_listed(there)}"


def _why_empty(group: MixtureGroup, mixture: MixtureConfig, kinds: Sequence[Kind]) -> str:
    fitting = [kind for kind in kinds if _fits(group, kind)]
    if not fitting:
        return "no document has one of its languages and one of its sources"
    if all(mixture.groups[group_of(mixture, *kind)] is not group for kind in fitting):
        return "the groups before it take every document that fits it"
    return "every document that fits it is a copy of another one, is kept aside for validation, or is capped"


def _listed(names: Iterable[str]) -> str:
    every = [name or "(none)" for name in sorted(names)]
    return ", ".join(every[:NAMES]) + (f" and {len(every) - NAMES} more" if every[NAMES:] else "")
