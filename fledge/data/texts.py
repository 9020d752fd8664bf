"""Any file or folder with text as documents: JSON lines with a language each, or plain texts.

For what needs some text and does not care how it is stored: calibration, measuring quality and speed. The data build
has more kinds of source (sources.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fledge.core.errors import UsageError
from fledge.data.compression import CompressionError, open_plain, plain_stem, plain_suffix
from fledge.data.documents import Document, read_jsonl

ADVICE = "give a plain text, JSON lines with a text each, or a folder of such files"


def read_texts(path: Path) -> Iterator[Document]:
    """The documents of a .jsonl file ({"text", "lang"} a line), the one document of a plain text, or a folder's.

    Each may be compressed. A plain text has the language "". In a folder all files count, in the order of their names,
    but those that are not UTF-8. Raises UsageError for what holds no text at all, is missing or damaged.
    """
    if not path.exists():
        raise UsageError(f"there is no text file {path}; {ADVICE}")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    empty = True
    for file in files:
        for document in _documents(file, lenient=path.is_dir()):
            if document.text:
                empty = False
                yield document
    if empty:
        raise UsageError(f"{path} holds no text; {ADVICE}")


def _documents(file: Path, lenient: bool) -> Iterator[Document]:
    if plain_suffix(file) == ".jsonl":
        yield from read_jsonl(file)
        return
    try:
        yield Document(plain_text(file), "", plain_stem(file))
    except UnicodeDecodeError as error:
        if not lenient:
            raise UsageError(f"{file} is not a text in UTF-8: {error}") from None
    except CompressionError as error:
        raise UsageError(f"{file} cannot be read: {error}") from None


def plain_text(file: Path) -> str:
    """The text of one file without the mark that some editors begin one with."""
    with open_plain(file) as stream:
        return stream.read().decode("utf-8-sig")
