"""Texts to measure tokenizers with.

Here: thinning, making up. Not here: reading files (fledge.data.texts), and anything that is measured.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate

from fledge.tokenizer import world_vocabulary

DOCUMENT_TOKENS = 1000


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
