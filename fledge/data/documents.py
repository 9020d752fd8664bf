"""Documents on disk: one JSON object a line with "text", "lang" and "src", plain or compressed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.core.errors import UsageError

OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".jsonl": open}


@dataclass(frozen=True)
class Document:
    """A text with where it came from. `language` is a plain code such as "de", or "code:python"."""

    text: str
    language: str
    source: str


def base_language(code: str) -> str:
    """The language without its region: "pt-BR" and "pt_BR" are "pt", "zh-TW" is "zh"; "code:python" stays."""
    return code if code.startswith("code:") else code.replace("_", "-").split("-")[0].lower()


def read_jsonl(path: Path) -> Iterator[Document]:
    """The documents of one .jsonl file, also .xz, .gz or .bz2. Raises UsageError with the number of a bad line."""
    opener = OPENERS.get(path.suffix)
    if opener is None:
        raise UsageError(f"{path}: cannot read {path.suffix!r} files; known: {', '.join(sorted(OPENERS))}")
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - the handlers below name the line
                yield _document(line, path.stem)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}, line {number}: not a JSON object with a text: {error}") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UsageError(f"{path}: cannot be read beyond line {number}: {error}") from None


def _document(line: str, source: str) -> Document:
    record = json.loads(line)
    text, language, source = record["text"], record.get("lang", ""), record.get("src", source)
    if not all(isinstance(value, str) for value in (text, language, source)):
        raise ValueError("text, lang and src must be strings")
    text.encode()  # a lone surrogate is no text
    return Document(text, base_language(language), source)
