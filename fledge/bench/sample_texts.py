"""Texts for the tokenizer benchmark: a sample of documents, or synthetic documents."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate

from fledge.tokenizer import world_vocabulary

DOCUMENT_TOKENS = 1000


def sample_documents(texts: Iterable[str], limit: int) -> list[str]:
    """Return every n-th document, n being the smallest power of two that keeps the total within `limit` bytes.

    At least one document is returned. It is cut if it is too long.
    """
    kept: list[str] = []
    size, stride = 0, 1
    for index, text in enumerate(texts):
        if index % stride:
            continue
        kept.append(text)
        size += len(text.encode())
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = count_bytes(kept)
    if size > limit:
        kept = [kept[0].encode()[: max(limit, 1)].decode("utf-8", errors="ignore")]
    return kept


def count_bytes(texts: Sequence[str]) -> int:
    """Return the size of all texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def synthetic_documents(limit: int, seed: int = 0) -> list[str]:
    """Return documents of about `limit` bytes, made of random World tokens of every script: a few frequent, most rare.

    The sequence of tokens has no meaning, so a tokenizer takes other branches than on written text. Use it to compare
    programs. The speed on real text has to be measured with real text.
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
