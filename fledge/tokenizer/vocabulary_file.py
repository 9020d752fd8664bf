"""The packaged file of the World vocabulary: written by scripts/make_world_vocabulary.py, read once.

World tokens are sorted by length in bytes, then by the bytes, and their ids count from 1 without gaps. So the file only
needs the number of tokens of each length, and all tokens joined. The payload, inside an xz container:

    uint8             L, the length in bytes of the longest token
    L x uint32 LE     the number of tokens with length 1, 2, ... L
    bytes             all tokens joined, in id order
"""

from __future__ import annotations

import hashlib
import lzma
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fledge.core.errors import TokenizerError
from fledge.core.files import get_asset_path

FILE_NAME = "world-vocabulary.xz"
PAYLOAD_BYTES = 373_871
PAYLOAD_SHA256 = "5efb99c36ed3fd4199979726290a91d8d13c81a054ab35537a379af22bd043ac"


def pack(tokens: Sequence[bytes]) -> bytes:
    """The payload for `tokens` (tokens[0] has id 1), which must be sorted by (length, bytes) without repeats."""
    keys = [(len(token), token) for token in tokens]
    assert keys and keys[0][0] > 0 and all(a < b for a, b in pairwise(keys)), "tokens are not sorted"
    longest = len(tokens[-1])
    counts = [0] * longest
    for token in tokens:
        counts[len(token) - 1] += 1
    return struct.pack(f"<B{longest}I", longest, *counts) + b"".join(tokens)


def unpack(payload: bytes) -> list[bytes]:
    """The tokens of a payload of `pack`, in id order from id 1."""
    longest = payload[0]
    counts = struct.unpack_from(f"<{longest}I", payload, 1)
    tokens: list[bytes] = []
    start = 1 + 4 * longest
    for length, count in enumerate(counts, start=1):
        end = start + length * count
        tokens += [payload[at : at + length] for at in range(start, end, length)]
        start = end
    return tokens


def compress(payload: bytes) -> bytes:
    """The xz file for a payload. One version of liblzma always gives the same bytes."""
    return lzma.compress(payload, check=lzma.CHECK_NONE, preset=6)


def read(path: Path | None = None) -> list[bytes]:
    """The 65 529 World tokens from the packaged file (or `path`), checked by SHA-256.

    Raises TokenizerError if the file is missing, damaged, or not this vocabulary.
    """
    path = path or get_asset_path(FILE_NAME)
    try:
        with lzma.open(path) as file:
            payload = file.read(PAYLOAD_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise TokenizerError(f"cannot read the World vocabulary {path}: {error}; install Fledge again") from error
    digest = hashlib.sha256(payload).hexdigest()
    if digest != PAYLOAD_SHA256:
        raise TokenizerError(
            f"{path} is not the World vocabulary: SHA-256 of its content is {digest}, "
            f"expected {PAYLOAD_SHA256}; install Fledge again"
        )
    return unpack(payload)
