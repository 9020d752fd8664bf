"""Read a text file, a JSON lines file or a folder of them as documents.

Used for calibration and benchmarks. The data build reads more kinds of sources (pipeline/sources/).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fledge.core.errors import UsageError
from fledge.data.compression import CompressionError, get_plain_stem, get_plain_suffix, open_decompressed
from fledge.data.documents import Document, read_jsonl

ADVICE = "give a plain text file, a JSON lines file with texts, or a folder of such files"


def read_texts(path: Path) -> Iterator[Document]:
    """The documents of a .jsonl file ({"text", "lang"} on each line), of a plain text file (one), or of a folder.

    Files may be compressed. A plain text has the language "". A folder is read recursively, in the order of the file
    names; files that are not UTF-8 are skipped. Raises UsageError if there is no text, or if a file is missing or
    cannot be read.
    """
    if not path.exists():
        raise UsageError(f"there is no text file {path}; {ADVICE}")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    empty = True
    for file in files:
        for document in _read_file(file, skip_binary=path.is_dir()):
            if document.text:
                empty = False
                yield document
    if empty:
        raise UsageError(f"{path} contains no text; {ADVICE}")


def _read_file(file: Path, skip_binary: bool) -> Iterator[Document]:
    if get_plain_suffix(file) == ".jsonl":
        yield from read_jsonl(file)
        return
    try:
        yield Document(read_plain_text(file), "", get_plain_stem(file))
    except UnicodeDecodeError as error:
        if not skip_binary:
            raise UsageError(f"{file} is not a UTF-8 text: {error}") from None
    except CompressionError as error:
        raise UsageError(f"{file} cannot be read: {error}") from None


def read_plain_text(file: Path) -> str:
    """The text of one file, without a byte order mark. Raises UnicodeDecodeError and CompressionError."""
    with open_decompressed(file) as stream:
        return stream.read().decode("utf-8-sig")
