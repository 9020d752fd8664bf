"""Documents, bytes and tokens, counted by stage, language and source: what a manifest and its report say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fledge.core.files import read_json


class Count(NamedTuple):
    """So much of something."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0

    def plus(self, other: Count) -> Count:
        """Both together."""
        return Count(*(one + two for one, two in zip(self, other, strict=True)))


class Counts:
    """(stage, language, source) -> Count."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str, str], Count] = {}

    def add(self, stage: str, language: str, source: str, count: Count) -> None:
        """Count more."""
        key = (stage, language, source)
        self._cells[key] = self._cells.get(key, Count()).plus(count)

    def merge(self, rows: Iterable[list[Any]]) -> None:
        """Add what `rows` gave elsewhere."""
        for stage, language, source, *numbers in rows:
            self.add(stage, language, source, Count(*numbers))

    def rows(self) -> list[list[Any]]:
        """Everything, as JSON can hold it, in one order whatever the order of counting."""
        return [[*key, *self._cells[key]] for key in sorted(self._cells)]

    def group_by(self, column: str) -> dict[str, dict[str, Count]]:
        """stage -> language or source -> Count."""
        at = {"language": 1, "source": 2}[column]
        found: dict[str, dict[str, Count]] = {}
        for key, count in sorted(self._cells.items()):
            stage = found.setdefault(key[0], {})
            stage[key[at]] = stage.get(key[at], Count()).plus(count)
        return found

    def totals(self) -> dict[str, Count]:
        """stage -> Count."""
        found: dict[str, Count] = {}
        for (stage, _, _), count in sorted(self._cells.items()):
            found[stage] = found.get(stage, Count()).plus(count)
        return found


def merge_count_files(files: Iterable[Path]) -> Counts:
    """The counts of several files of rows."""
    counts = Counts()
    for rows in _each(files):
        counts.merge(rows)
    return counts


def _each(files: Iterable[Path]) -> Iterator[list[list[Any]]]:
    for file in files:
        yield read_json(file)
