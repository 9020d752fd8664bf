"""Texts to measure tokenizers with: documents from files, or made-up ones.

Here: reading, thinning, making up. Not here: anything that is measured.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO

from fledge.core.errors import UsageError
from fledge.tokenizer import world_vocabulary

DOCUMENT_TOKENS = 1000


def documents(path: Path) -> Iterator[str]:
    """Every document of a file, or of all files below a folder, in the order of their names.

    Of `.jsonl` and `.jsonl.xz` the field "text" of each line; any other file is one document. Files that are not UTF-8
    are left out. Raises UsageError where there is nothing to read.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a file of text or a folder of such files")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    empty = True
    for file in files:
        for text in _documents_of(file):
            empty = False
            yield text
    if empty:
        raise UsageError(f"{path} holds no text; give a file of text or a folder of such files")


def _documents_of(file: Path) -> Iterator[str]:
    try:
        if file.name.endswith((".jsonl", ".jsonl.xz")):
            with _opened(file) as lines:
                for line in lines:
                    yield from _nonempty(str(json.loads(line)["text"]))
        else:
            yield from _nonempty(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return
    except (OSError, ValueError, KeyError, TypeError, EOFError, lzma.LZMAError) as error:
        raise UsageError(f"cannot read documents from {file}: {error!r:.200}") from error


def _nonempty(text: str) -> list[str]:
    return [text] if text else []


def _opened(file: Path) -> IO[str]:
    return lzma.open(file, "rt", encoding="utf-8") if file.suffix == ".xz" else file.open(encoding="utf-8")


def thinned(texts: Iterable[str], limit: int) -> list[str]:
    """Documents at even distances, up to `limit` bytes together and more than half of that, if there are so many.

    At least one document; it is cut if it is too long.
    """
    kept: list[str] = []
    size, stride = 0, 1
    for at, text in enumerate(texts):
        if at % stride:
            continue
        kept.append(text)
        size += len(text.encode())
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = size_of(kept)
    if size > limit:
        kept = [kept[0].encode()[: max(limit, 1)].decode("utf-8", errors="ignore")]
    return kept


def size_of(texts: Sequence[str]) -> int:
    """Bytes of UTF-8."""
    return sum(len(text.encode()) for text in texts)


def synthetic(limit: int, seed: int = 0) -> list[str]:
    """Documents of about `limit` bytes made of World tokens of every script: a few come often, most seldom.

    Token follows token without sense, so a tokenizer meets fewer of its usual paths than in written text. Good for
    comparing programs; the speed on real text is for real text to tell.
    """
    tokens = [token.decode() for token in world_vocabulary().tokens if token and _is_text(token)]
    rng = random.Random(seed)
    rng.shuffle(tokens)
    weights = list(accumulate(1 / (rank + 20) for rank in range(len(tokens))))
    texts: list[str] = []
    size = 0
    while size < limit:
        texts.append("".join(rng.choices(tokens, cum_weights=weights, k=DOCUMENT_TOKENS)))
        size += len(texts[-1].encode())
    return texts


def _is_text(token: bytes) -> bool:
    try:
        return bool(token.decode("utf-8"))
    except UnicodeDecodeError:
        return False
