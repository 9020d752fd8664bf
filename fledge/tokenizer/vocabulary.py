"""Vocabularies: the bytes of each id, and the JSON record of a few kilobytes that a checkpoint stores.

Three kinds:

    world    the World vocabulary: id 0 end of text, 1..256 the bytes 0..255, 257..65529 longer tokens, V = 65536
    pruned   a part of World for small models: 0..256 as in World, then the kept tokens in World order without gaps
    bytes    id = byte value, V = 256, no end-of-text id (tiny test models)
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import operator
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal

from fledge.core.errors import TokenizerError
from fledge.tokenizer import vocabulary_file
from fledge.tokenizer.base import NO_EOS

WORLD_SIZE = 65536
"""Rows of a World model: 65,530 ids in use, the rest reserved so that the matrix has a round size."""

BYTE_IDS = 257
"""Ids 0..256 of World and of every pruned vocabulary: end of text and the 256 bytes."""

LARGEST_SIZE = 1 << 20
"""The largest number of rows in a record: far above any model, and too small for a hostile record to fill memory."""

SPEC_KEYS = {
    "world": {"kind"},
    "bytes": {"kind"},
    "pruned": {"kind", "kept", "count", "size", "sha256"},
}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The bytes of every id. Immutable. Two vocabularies are equal if their fingerprints are.

    tokens: bytes by id, one entry for each row of a model; b"" for the end of text and for reserved ids.
    eos_id: the end-of-text id, or NO_EOS.
    kept:   for a pruned vocabulary, the World id of each id from 257 on, in increasing order; else empty.
    """

    kind: Literal["world", "pruned", "bytes"]
    tokens: tuple[bytes, ...] = field(repr=False)
    eos_id: int = 0
    kept: tuple[int, ...] = field(default=(), repr=False)

    @property
    def size(self) -> int:
        """Number of rows that a model needs, including reserved ids."""
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the end-of-text id and of every token in id order, each after its length."""
        parts = [struct.pack("<i", self.eos_id)]
        for token in self.tokens:
            parts += (struct.pack("<I", len(token)), token)
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def used(self) -> int:
        """Number of ids in use, including the end of text. The ids from this number to `size` are reserved."""
        return max(token_id for token_id, token in enumerate(self.tokens) if token) + 1

    @property
    def world_ids(self) -> tuple[int, ...]:
        """The World id of each id in use: the rows to copy when a World model is reduced to this vocabulary."""
        if self.kind == "bytes":
            raise TokenizerError("a byte vocabulary has no World ids; only World and pruned vocabularies do")
        if self.kind == "world":
            return tuple(range(self.used))
        return (*range(BYTE_IDS), *self.kept)

    def to_spec(self) -> dict[str, Any]:
        """A JSON record. It is small because World itself is named and not stored."""
        if self.kind != "pruned":
            return {"kind": self.kind}
        return {
            "kind": "pruned",
            "kept": _pack_increasing(self.kept),
            "count": len(self.kept),
            "size": self.size,
            "sha256": self.fingerprint,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary of a record. Raises TokenizerError if the record does not describe a vocabulary exactly."""
        if not isinstance(spec, Mapping):
            raise TokenizerError(f"a vocabulary record is a JSON object, not {type(spec).__name__}")
        kind = spec.get("kind")
        if not isinstance(kind, str) or kind not in SPEC_KEYS:
            raise TokenizerError(f"vocabulary kind {kind!r:.60} is unknown; known kinds: {', '.join(SPEC_KEYS)}")
        if set(spec) != SPEC_KEYS[kind]:
            raise TokenizerError(
                f"a {kind} vocabulary record has the keys {sorted(SPEC_KEYS[kind])}, "
                f"not {sorted(map(str, spec))!s:.200}"
            )
        if kind == "world":
            return world_vocabulary()
        if kind == "bytes":
            return byte_vocabulary()
        return _pruned_from_spec(spec)


@lru_cache(maxsize=1)
def world_vocabulary() -> Vocabulary:
    """The World vocabulary, V = 65536, read from the package once in a process."""
    tokens = vocabulary_file.read()
    reserved = WORLD_SIZE - 1 - len(tokens)
    return Vocabulary("world", (b"", *tokens, *[b""] * reserved))


@lru_cache(maxsize=1)
def byte_vocabulary() -> Vocabulary:
    """Id = byte value, V = 256, no end-of-text id."""
    return Vocabulary("bytes", tuple(bytes([value]) for value in range(256)), NO_EOS)


def prune(world: Vocabulary, keep: Iterable[int], size: int | None = None, *, multiple: int = 1) -> Vocabulary:
    """World reduced to the end of text, the 256 bytes and the World ids in `keep` (any order, repeats allowed).

    size:     rows of the result, at least the number of ids; the rest are reserved ids.
    multiple: without `size`, the number of rows is rounded up to a multiple of this.
    """
    if world.kind != "world":
        raise TokenizerError(f"only the World vocabulary can be pruned, not a {world.kind} vocabulary")
    if multiple < 1:
        raise TokenizerError(f"multiple {multiple} is too small: at least 1")
    kept = sorted({operator.index(token_id) for token_id in keep} - set(range(BYTE_IDS)))
    used = BYTE_IDS + len(kept)
    rows = -(-used // multiple) * multiple if size is None else size
    if rows < used:
        raise TokenizerError(f"size {rows} is too small: {used} ids are kept (always including the first {BYTE_IDS})")
    if rows > LARGEST_SIZE:
        raise TokenizerError(f"size {rows} is too large: at most {LARGEST_SIZE} rows")
    for token_id in kept:
        if not (0 <= token_id < world.size and world.tokens[token_id]):
            raise TokenizerError(f"id {token_id} cannot be kept: World tokens have the ids 1..65529")
    tokens = [*world.tokens[:BYTE_IDS], *(world.tokens[token_id] for token_id in kept), *[b""] * (rows - used)]
    return Vocabulary("pruned", tuple(tokens), kept=tuple(kept))


def _pruned_from_spec(spec: Mapping[str, Any]) -> Vocabulary:
    count, size = spec["count"], spec["size"]
    if type(count) is not int or not 0 <= count <= WORLD_SIZE:
        raise TokenizerError(f"vocabulary record: count {count!r:.60} is not a number of World tokens")
    if type(size) is not int or not 0 <= size <= LARGEST_SIZE:
        raise TokenizerError(f"vocabulary record: size {size!r:.60} is not a number of rows up to {LARGEST_SIZE}")
    kept = _unpack_increasing(spec["kept"], count)
    if kept and kept[0] < BYTE_IDS:
        raise TokenizerError(
            f"vocabulary record: kept id {kept[0]} is one of the first {BYTE_IDS}, which are always kept"
        )
    vocabulary = prune(world_vocabulary(), kept, size=size)
    if vocabulary.fingerprint != spec["sha256"]:
        raise TokenizerError(
            f"vocabulary record: its tokens have SHA-256 {vocabulary.fingerprint}, but the record has "
            f"{spec['sha256']!r:.80}; the record is damaged"
        )
    return vocabulary


def _pack_increasing(ids: tuple[int, ...]) -> str:
    """Base64 of zlib of the differences between successive ids (the first from 0), as uint16 LE."""
    steps = [after - before for before, after in zip((0, *ids), ids, strict=False)]
    return base64.b64encode(zlib.compress(struct.pack(f"<{len(steps)}H", *steps), 9)).decode("ascii")


def _unpack_increasing(text: object, count: int) -> tuple[int, ...]:
    """The `count` increasing ids of `_pack_increasing`. Decompresses only the bytes that they need."""
    if not isinstance(text, str):
        raise TokenizerError(f"vocabulary record: kept is base64 text, not {type(text).__name__}")
    try:
        decompressor = zlib.decompressobj()
        raw = decompressor.decompress(base64.b64decode(text, validate=True), 2 * count + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise TokenizerError(f"vocabulary record: kept cannot be unpacked: {error}") from error
    if len(raw) != 2 * count or not decompressor.eof or decompressor.unused_data:
        raise TokenizerError(f"vocabulary record: kept does not contain exactly {count} ids")
    steps = struct.unpack(f"<{count}H", raw)
    if not all(steps):
        raise TokenizerError("vocabulary record: the kept ids are not in increasing order")
    return tuple(accumulate(steps))
