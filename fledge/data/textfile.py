"""Any file with text as documents: JSON lines with a language each, or one plain text.

For what needs some text and does not care how it is stored: calibration, measuring quality.
"""

from __future__ import annotations

import lzma
from pathlib import Path

from fledge.core.errors import UsageError
from fledge.data.documents import OPENERS, Document, read_jsonl


def read_texts(path: Path) -> list[Document]:
    """The documents of a .jsonl file ({"text", "lang"} a line), or the one document of a plain text in UTF-8.

    Either may be compressed (.xz, .gz, .bz2). A plain text has the language "". Raises UsageError for a file without
    any text, and for one that is missing or damaged.
    """
    if not path.is_file():
        raise UsageError(f"there is no text file {path}; give a plain text, or JSON lines with a text each")
    if ".jsonl" in path.suffixes[-2:]:
        documents = list(read_jsonl(path))
    else:
        documents = [Document(_plain_text(path), "", path.stem)]
    documents = [document for document in documents if document.text]
    if not documents:
        raise UsageError(f"{path} holds no text")
    return documents


def _plain_text(path: Path) -> str:
    opener = OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            data: bytes = file.read()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text in UTF-8: {error}") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
