"""What a document is, and JSON lines: one object a line with a text, its language and its source.

Here: one record to one document, and where a bad one stands. Not here: which files there are, and other kinds of file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.core.errors import UsageError
from fledge.data.compression import OPENERS, CompressionError, open_plain, plain_stem, plain_suffix

Bad = Callable[[int, Exception], None]
"""What to do about line `number`, which is no document: raise, or count it."""


ARRAY = ValueError('an array begins here; each line must be one object: {"text": ...}')


@dataclass(frozen=True)
class Document:
    """A text with where it came from. `language` is a plain code such as "de", or "code:python"."""

    text: str
    language: str
    source: str


@dataclass(frozen=True)
class RecordFields:
    """How a record becomes a document: names of its fields, and what holds where it has none."""

    text: str = "text"
    template: str = ""  # instead of one field of text: a text with {field} in it
    language_field: str = "lang"
    source_field: str = "src"
    language: str = ""
    source: str = ""

    def document(self, record: Mapping[str, Any]) -> Document:
        """Raises ValueError, KeyError, TypeError or AttributeError for a record that is none."""
        if not isinstance(record, Mapping):
            raise ValueError("it is JSON, but no object")
        text = self._filled(record) if self.template else record[self.text]
        language = record.get(self.language_field) or self.language
        source = record.get(self.source_field) or self.source
        if not (isinstance(text, str) and isinstance(language, str) and isinstance(source, str)):
            raise ValueError("text, lang and src must be strings")
        if not text.isascii():
            text.encode()  # a lone surrogate is no text
        return Document(text, base_language(language), source)

    def _filled(self, record: Mapping[str, Any]) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: str(record[match[1]]), self.template)


def base_language(code: str) -> str:
    """The language without its region: "pt-BR" and "pt_BR" are "pt", "zh-TW" is "zh"; "code:python" stays."""
    return code if code.startswith("code:") else code.replace("_", "-").split("-")[0].lower()


def parse_lines(lines: Iterable[bytes], fields: RecordFields, bad: Bad, first: int = 1) -> Iterator[Document]:
    """The documents of JSON lines. The first line has the number `first`. Blank lines are skipped."""
    for number, line in enumerate(lines, first):
        if line.isspace():
            continue
        try:
            document = fields.document(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            bad(number, ARRAY if line.lstrip().startswith(b"[") else error)
            continue
        yield document


def bad_line(path: Path, number: int, error: Exception) -> UsageError:
    """The error for a line that is no document."""
    reason = f"it has no field {error}" if isinstance(error, KeyError) else error
    return UsageError(f"{path}, line {number}: not a JSON object with a text: {reason}")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of one .jsonl file, plain or compressed, from 1 on. Raises UsageError for another or a damaged one."""
    if plain_suffix(path) != ".jsonl":
        known = ", ".join(sorted([".jsonl", *OPENERS]))
        raise UsageError(f"{path}: cannot read {path.suffix!r} files; known: {known}")
    number = 0
    try:
        with open_plain(path) as lines:
            for number, line in enumerate(lines, 1):
                yield number, line
    except CompressionError as error:
        where = f"cannot be read beyond line {number}" if number else "cannot be read"
        raise UsageError(f"{path}: {where}: {error}") from None


def read_jsonl(path: Path) -> Iterator[Document]:
    """The documents of one .jsonl file, plain or compressed. Raises UsageError with the number of a bad line."""

    def bad(number: int, error: Exception) -> None:
        raise bad_line(path, number, error)

    yield from parse_lines((line for _, line in numbered_lines(path)), RecordFields(source=plain_stem(path)), bad)
