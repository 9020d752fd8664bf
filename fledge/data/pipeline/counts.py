"""Counts of documents, bytes and tokens by stage, language and source, for the manifest and its report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fledge.core.files import read_json


class Count(NamedTuple):
    """A number of documents, with their bytes and tokens."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0

    def plus(self, other: Count) -> Count:
        """The sum of two counts."""
        return Count(*(one + two for one, two in zip(self, other, strict=True)))


class Counts:
    """(stage, language, source) -> Count."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str, str], Count] = {}

    def add(self, stage: str, language: str, source: str, count: Count) -> None:
        """Add to the count of a stage, language and source."""
        key = (stage, language, source)
        self._cells[key] = self._cells.get(key, Count()).plus(count)

    def merge(self, rows: Iterable[list[Any]]) -> None:
        """Add the result of `rows` of other counts."""
        for stage, language, source, *numbers in rows:
            self.add(stage, language, source, Count(*numbers))

    def rows(self) -> list[list[Any]]:
        """[stage, language, source, documents, bytes, tokens] of every count, for JSON, in sorted order."""
        return [[*key, *self._cells[key]] for key in sorted(self._cells)]

    def group_by(self, column: str) -> dict[str, dict[str, Count]]:
        """stage -> language or source -> Count. column: "language" or "source"."""
        key_index = {"language": 1, "source": 2}[column]
        groups: dict[str, dict[str, Count]] = {}
        for key, count in sorted(self._cells.items()):
            stage = groups.setdefault(key[0], {})
            stage[key[key_index]] = stage.get(key[key_index], Count()).plus(count)
        return groups

    def totals(self) -> dict[str, Count]:
        """stage -> Count."""
        totals: dict[str, Count] = {}
        for (stage, _, _), count in sorted(self._cells.items()):
            totals[stage] = totals.get(stage, Count()).plus(count)
        return totals


def merge_count_files(files: Iterable[Path]) -> Counts:
    """The sum of the counts in several files, each with the JSON of `Counts.rows`."""
    counts = Counts()
    for file in files:
        counts.merge(read_json(file))
    return counts
