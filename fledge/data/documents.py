"""Documents, and JSON lines files: each line is an object with a text, its language and its source."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.core.errors import UsageError
from fledge.data.compression import OPENERS, CompressionError, get_plain_stem, get_plain_suffix, open_decompressed

OnInvalid = Callable[[int, Exception], None]
"""Called with the line number and the error of a record that is not a document. It raises or returns."""


ARRAY_ERROR = ValueError('an array begins here; each line must be one object: {"text": ...}')


@dataclass(frozen=True)
class Document:
    """A text with its language and its source. `language` is a code such as "de" or "code:python"."""

    text: str
    language: str
    source: str


@dataclass(frozen=True)
class RecordFields:
    """How to convert a record to a document: the names of its fields, and defaults for missing ones."""

    text: str = "text"
    template: str = ""  # replaces `text`: a text with {field} placeholders
    language_field: str = "lang"
    source_field: str = "src"
    language: str = ""  # default
    source: str = ""  # default

    def to_document(self, record: Mapping[str, Any]) -> Document:
        """The document of a record. Raises ValueError, KeyError, TypeError or AttributeError if it is invalid."""
        if not isinstance(record, Mapping):
            raise ValueError("it is JSON, but not an object")
        text = self._fill_template(record) if self.template else record[self.text]
        language = record.get(self.language_field) or self.language
        source = record.get(self.source_field) or self.source
        if not (isinstance(text, str) and isinstance(language, str) and isinstance(source, str)):
            raise ValueError("text, lang and src must be strings")
        if not text.isascii():
            text.encode()  # raises for a lone surrogate
        return Document(text, strip_region(language), source)

    def _fill_template(self, record: Mapping[str, Any]) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: str(record[match[1]]), self.template)


def strip_region(code: str) -> str:
    """The language without its region: "pt-BR" and "pt_BR" become "pt"; "code:python" is unchanged."""
    return code if code.startswith("code:") else code.replace("_", "-").split("-")[0].lower()


def parse_lines(
    lines: Iterable[bytes], fields: RecordFields, on_invalid: OnInvalid, first: int = 1
) -> Iterator[Document]:
    """The documents of JSON lines. Skips blank lines. first: the number of the first line."""
    for number, line in enumerate(lines, first):
        if line.isspace():
            continue
        try:
            document = fields.to_document(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            on_invalid(number, ARRAY_ERROR if line.lstrip().startswith(b"[") else error)
            continue
        yield document


def make_line_error(path: Path, number: int, error: Exception) -> UsageError:
    """The error for a line that is not a document."""
    reason = f"it has no field {error}" if isinstance(error, KeyError) else error
    return UsageError(f"{path}, line {number}: not a JSON object with a text: {reason}")


def read_numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a .jsonl file, plain or compressed.

    Raises UsageError for another kind of file or one that cannot be read.
    """
    if get_plain_suffix(path) != ".jsonl":
        supported = ", ".join(sorted([".jsonl", *OPENERS]))
        raise UsageError(f"{path}: cannot read {path.suffix!r} files; supported: {supported}")
    number = 0
    try:
        with open_decompressed(path) as lines:
            for number, line in enumerate(lines, 1):
                yield number, line
    except CompressionError as error:
        problem = f"cannot be read beyond line {number}" if number else "cannot be read"
        raise UsageError(f"{path}: {problem}: {error}") from None


def read_jsonl(path: Path) -> Iterator[Document]:
    """The documents of one .jsonl file, plain or compressed. Raises UsageError with the number of a bad line."""

    def fail(number: int, error: Exception) -> None:
        raise make_line_error(path, number, error)

    yield from parse_lines(
        (line for _, line in read_numbered_lines(path)), RecordFields(source=get_plain_stem(path)), fail
    )
