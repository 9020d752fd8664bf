"""Match documents to the groups of the mixture, and report patterns and groups that match no document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from fledge.data.pipeline.config import MixtureConfig, MixtureGroup

MAX_NAMES = 8  # languages or sources that a message lists

Kind = tuple[str, str]
"""(language, source) of a document."""


def find_group(mixture: MixtureConfig, language: str, source: str) -> int:
    """The number of the first group that matches, or -1."""
    for number, group in enumerate(mixture.groups):
        if _matches(group, (language, source)):
            return number
    return -1


def _matches(group: MixtureGroup, kind: Kind) -> bool:
    language, source = kind
    return _matches_any(language, group.languages) and _matches_any(source, group.sources)


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def list_remarks(mixture: MixtureConfig, kinds: Sequence[Kind], sizes: Sequence[int]) -> Iterator[str]:
    """A line for each pattern and cap of the mixture that matches nothing, each empty group, and unmatched documents.

    kinds: all kinds of documents after cleaning, in any order. sizes: bytes of text available to each group.
    """
    for group, size in zip(mixture.groups, sizes, strict=True):
        lines = list(_report_unmatched(group, kinds))
        if not size and not lines:
            lines = [_explain_empty(group, mixture, kinds)]
        yield from (f"group {group.name} of the mixture: {line}" for line in lines)
    sources = {source for _, source in kinds}
    for name in mixture.source_bytes:
        if name not in sources:
            yield f"mixture.source_bytes: no document has the source {name!r}; sources: {_format_names(sources)}"
    unmatched = sorted(kind for kind in kinds if find_group(mixture, *kind) < 0)
    if unmatched:
        language, source = unmatched[0]
        yield f"documents without a group of the mixture are not used: language {language!r}, source {source!r}" + (
            f", and {len(unmatched) - 1} more such pairs" if unmatched[1:] else ""
        )


def _report_unmatched(group: MixtureGroup, kinds: Sequence[Kind]) -> Iterator[str]:
    columns = {
        "language": (group.languages, {language for language, _ in kinds}),
        "source": (group.sources, {source for _, source in kinds}),
    }
    for column, (patterns, names) in columns.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                yield f"no document has the {column} {pattern!r}; {column}s: {_format_names(names)}"


def _explain_empty(group: MixtureGroup, mixture: MixtureConfig, kinds: Sequence[Kind]) -> str:
    matching = [kind for kind in kinds if _matches(group, kind)]
    if not matching:
        return "no document has one of its languages and one of its sources"
    if all(mixture.groups[find_group(mixture, *kind)] is not group for kind in matching):
        return "earlier groups match all of its documents"
    return "all of its documents are duplicates, are held out for validation, or exceed a cap"


def _format_names(names: Iterable[str]) -> str:
    every = [name or "(none)" for name in sorted(names)]
    return ", ".join(every[:MAX_NAMES]) + (f" and {len(every) - MAX_NAMES} more" if every[MAX_NAMES:] else "")
