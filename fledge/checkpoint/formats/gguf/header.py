"""The header of a GGUF file: its keys and where its tensors lie, read with limits, because a header may lie.

    magic     "GGUF", uint32 version (2 or 3), uint64 number of tensors, uint64 number of keys
    keys      each: text, uint32 type, value; an array is uint32 type of its items, uint64 how many, the items
    tensors   each: text, uint32 axes, uint64 sizes (the fastest axis first), uint32 type, uint64 offset
    data      from the next multiple of `general.alignment` (32 by default); offsets count from there

Texts are a uint64 length and UTF-8; everything is little-endian. The reader of the `gguf` package is not used here: it
trusts every length, so each of them has to be checked first, and checking them is reading the header; and it takes one
and a half seconds for the token list of a World model. A test holds the two together. Here: bytes to numbers, texts
and places. Not here: what they mean, and the tensors' bytes.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fledge.checkpoint.formats.gguf.blocks import get_block_size
from fledge.core.errors import CheckpointError, UnsupportedError

LARGEST_HEADER = 32 << 20  # bytes; a World model of any size needs a little over one megabyte
MOST_ENTRIES = 1 << 16  # keys, and tensors; Finch 14B has 1600
MOST_TEXTS = 1 << 20  # items of one array of texts; as many as a vocabulary may have
LONGEST_NAME = 1 << 10  # bytes
MOST_AXES = 4
LARGEST_TENSOR = 1 << 56  # numbers; far beyond any file, far below what overflows
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
TEXT, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")


class NumberArray(NamedTuple):
    """An array of numbers as it lies in the file; most are never looked at."""

    code: str  # of the struct module
    raw: bytes

    def unpack(self) -> tuple[Any, ...]:
        """Its values."""
        return struct.unpack(f"<{len(self.raw) // struct.calcsize(self.code)}{self.code}", self.raw)


@dataclass(frozen=True)
class TensorLocation:
    """Where the bytes of one tensor are, and what they are."""

    type: int  # ggml's number, see gguf_blocks.py
    shape: tuple[int, ...]  # the slowest axis first, as numpy and torch have it
    begin: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the tensors' bytes."""

    path: Path
    size: int  # bytes of the whole file
    values: dict[str, Any]  # numbers, bool, str, list[bytes] or Numbers
    locations: dict[str, TensorLocation]  # in file order


class _Damage(Exception):
    """What is wrong, to be told with the file's name."""


def read_header(path: Path, check: Callable[[Path, dict[str, Any]], None] = lambda path, values: None) -> GgufHeader:
    """The header of a file, once all its tensors are known to lie in the file and apart from each other.

    check: may refuse the file for its keys, before its tensors are looked at. Raises CheckpointError for a damaged
    file, UnsupportedError for other versions of GGUF and types of tensors.
    """
    try:
        size = path.stat().st_size
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), min(size, LARGEST_HEADER), access=mmap.ACCESS_READ) as data,
        ):
            cursor = _Cursor(data, whole=size <= LARGEST_HEADER)
            tensors, keys = _read_counts(cursor, path)
            values = _read_values(cursor, keys)
            check(path, values)
            locations = _read_places(cursor, tensors, _alignment(values), path)
        _check_places(locations, size)
    except _Damage as error:
        raise CheckpointError(f"{path} is damaged: {error}; download or copy it again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return GgufHeader(path, size, values, locations)


def _read_counts(cursor: _Cursor, path: Path) -> tuple[int, int]:
    magic, version = cursor.take(4), cursor.number("I")
    if magic != b"GGUF":
        raise _Damage("it does not begin with GGUF")
    if version in (2 << 24, 3 << 24):
        raise UnsupportedError(f"{path} is a big-endian GGUF file; Fledge reads little-endian ones: convert it again")
    if version not in (2, 3):
        raise UnsupportedError(f"{path} is a GGUF file of version {version}; Fledge reads 2 and 3: convert it again")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if max(tensors, keys) > MOST_ENTRIES:
        raise _Damage(f"it claims {tensors} tensors and {keys} keys")
    return tensors, keys


def _read_values(cursor: _Cursor, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name()
        if key in values:
            raise _Damage(f"the key {key!r:.80} is there twice")
        values[key] = _read_value(cursor, key)
    return values


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.number("I")
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind == TEXT:
        return cursor.text().decode("utf-8", errors="replace")
    if kind != ARRAY:
        raise _Damage(f"the key {key!r:.80} has the unknown type {kind}")
    kind, count = cursor.number("I"), cursor.number("Q")
    if kind == TEXT:
        return cursor.texts(count)
    if kind not in SCALARS:  # arrays of arrays as well, which no checkpoint has
        raise _Damage(f"the key {key!r:.80} is an array of the type {kind}")
    return NumberArray(SCALARS[kind], cursor.take(count * struct.calcsize(SCALARS[kind])))


def _alignment(values: dict[str, Any]) -> int:
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _Damage(f"general.alignment is {alignment!r:.40}, which is no power of two")
    return alignment


def _read_places(cursor: _Cursor, count: int, alignment: int, path: Path) -> dict[str, TensorLocation]:
    found = []
    for _ in range(count):
        name, axes = cursor.name(), cursor.number("I")
        if not 1 <= axes <= MOST_AXES:
            raise _Damage(f"the tensor {name!r:.80} has {axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        found.append((name, shape, cursor.number("I"), cursor.number("Q")))
    start = -(-cursor.at // alignment) * alignment
    locations: dict[str, TensorLocation] = {}
    for name, shape, kind, offset in found:
        if name in locations:
            raise _Damage(f"the tensor {name!r:.80} is there twice")
        if offset % alignment:
            raise _Damage(f"the tensor {name!r:.80} does not begin at a multiple of {alignment}")
        locations[name] = TensorLocation(kind, shape, start + offset, _bytes_of(name, shape, kind, path))
    return locations


def _bytes_of(name: str, shape: Sequence[int], kind: int, path: Path) -> int:
    """The bytes of a tensor of this shape and type."""
    try:
        numbers, size = get_block_size(kind)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {name!r:.80}: {error}") from error
    count = math.prod(shape)
    if not 0 < count < LARGEST_TENSOR or shape[-1] % numbers:
        raise _Damage(f"the tensor {name!r:.80} has the impossible shape {tuple(shape)}")
    return count // numbers * size


def _check_places(locations: dict[str, TensorLocation], size: int) -> None:
    """Every tensor inside the file and none over another: what is read is then never more than what is there."""
    end, before = 0, ""
    for name, place in sorted(locations.items(), key=lambda item: item[1].begin):
        if place.begin < end:
            raise _Damage(f"the tensors {before!r:.80} and {name!r:.80} overlap")
        end, before = place.begin + place.nbytes, name
        if end > size:
            raise _Damage(f"the tensor {name!r:.80} ends at byte {end}, the file has {size}")


class _Cursor:
    """A place in the header that only moves on, and never past its end."""

    def __init__(self, data: mmap.mmap, *, whole: bool) -> None:
        self._data, self._whole = data, whole
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self._data) - self.at:
            self._past_the_end()
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        """The next number, of a struct code."""
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> bytes:
        """The next text."""
        return self.take(self.number("Q"))

    def name(self) -> str:
        """The next text, which must be short and UTF-8."""
        raw = self.text()
        try:
            if len(raw) <= LONGEST_NAME:
                return raw.decode("utf-8")
        except UnicodeDecodeError:
            pass
        raise _Damage(f"{raw[:40]!r} is no name")

    def texts(self, count: int) -> list[bytes]:
        """The next `count` texts: `text` without its calls, for 65536 of them."""
        if count > MOST_TEXTS:
            raise _Damage(f"an array claims {count} texts")
        data, at, last = self._data, self.at, len(self._data)
        found = []
        for _ in range(count):
            if at + 8 > last:
                self._past_the_end()
            start = at + 8
            at = start + LENGTH.unpack_from(data, at)[0]
            if at > last:
                self._past_the_end()
            found.append(data[start:at])
        self.at = at
        return found

    def _past_the_end(self) -> NoReturn:
        raise _Damage("its header ends too early" if self._whole else f"its header claims over {LARGEST_HEADER} bytes")
