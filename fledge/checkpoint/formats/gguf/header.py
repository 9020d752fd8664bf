"""Read the header of a GGUF file, with its keys and the locations of its tensors, with limits for hostile files.

    magic     "GGUF", uint32 version (2 or 3), uint64 number of tensors, uint64 number of keys
    keys      each: text, uint32 type, value; an array is uint32 type of its items, uint64 count, the items
    tensors   each: text, uint32 axes, uint64 sizes (the fastest axis first), uint32 type, uint64 offset
    data      from the next multiple of `general.alignment` (32 by default); offsets count from there

Texts are a uint64 length and UTF-8; everything is little-endian. The reader of the `gguf` package is not used: it
trusts every length, so that each of them would have to be checked first, which amounts to reading the header; and it
takes one and a half seconds for the token list of a World model. A test checks that both agree.
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

MAX_HEADER_BYTES = 32 << 20  # a World model of any size needs a little over one megabyte
MAX_ENTRIES = 1 << 16  # keys, and tensors; Finch 14B has 1600
MAX_TEXTS = 1 << 20  # items of one array of texts; the largest vocabulary
MAX_NAME_BYTES = 1 << 10
MAX_AXES = 4
MAX_TENSOR_NUMBERS = 1 << 56  # far above any file and far below an overflow
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
TEXT, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")


class NumberArray(NamedTuple):
    """An array of numbers as in the file; most are never unpacked."""

    code: str  # of the struct module
    raw: bytes

    def unpack(self) -> tuple[Any, ...]:
        """Return the values."""
        return struct.unpack(f"<{len(self.raw) // struct.calcsize(self.code)}{self.code}", self.raw)


@dataclass(frozen=True)
class TensorLocation:
    """The location and type of one tensor."""

    type: int  # the number in ggml, see blocks.py
    shape: tuple[int, ...]  # the slowest axis first, as in numpy and torch
    begin: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the tensors' bytes."""

    path: Path
    size: int  # bytes of the whole file
    values: dict[str, Any]  # numbers, bool, str, list[bytes] or NumberArray
    locations: dict[str, TensorLocation]  # in file order


class _HeaderError(Exception):
    """The header is damaged. The text is a description without the file name."""


def read_header(path: Path, check: Callable[[Path, dict[str, Any]], None] = lambda path, values: None) -> GgufHeader:
    """Read the header of a file, and check that all tensors are inside the file and do not overlap.

    check: called with path and keys before the tensors are read; it may raise an error. Raises CheckpointError for a
    damaged file, UnsupportedError for other versions of GGUF and unknown types of tensors.
    """
    try:
        size = path.stat().st_size
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), min(size, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as data,
        ):
            cursor = _Cursor(data, whole=size <= MAX_HEADER_BYTES)
            tensors, keys = _read_counts(cursor, path)
            values = _read_values(cursor, keys)
            check(path, values)
            locations = _read_locations(cursor, tensors, _get_alignment(values), path)
        _check_locations(locations, size)
    except _HeaderError as error:
        raise CheckpointError(f"{path} is damaged: {error}; download or copy it again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return GgufHeader(path, size, values, locations)


def _read_counts(cursor: _Cursor, path: Path) -> tuple[int, int]:
    magic, version = cursor.read(4), cursor.read_number("I")
    if magic != b"GGUF":
        raise _HeaderError("it does not begin with GGUF")
    if version in (2 << 24, 3 << 24):
        raise UnsupportedError(f"{path} is a big-endian GGUF file; Fledge reads little-endian ones: convert it again")
    if version not in (2, 3):
        raise UnsupportedError(f"{path} is a GGUF file of version {version}; Fledge reads 2 and 3: convert it again")
    tensors, keys = cursor.read_number("Q"), cursor.read_number("Q")
    if max(tensors, keys) > MAX_ENTRIES:
        raise _HeaderError(f"it claims {tensors} tensors and {keys} keys")
    return tensors, keys


def _read_values(cursor: _Cursor, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.read_name()
        if key in values:
            raise _HeaderError(f"the key {key!r:.80} is repeated")
        values[key] = _read_value(cursor, key)
    return values


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.read_number("I")
    if kind in SCALARS:
        return cursor.read_number(SCALARS[kind])
    if kind == TEXT:
        return cursor.read_text().decode("utf-8", errors="replace")
    if kind != ARRAY:
        raise _HeaderError(f"the key {key!r:.80} has the unknown type {kind}")
    kind, count = cursor.read_number("I"), cursor.read_number("Q")
    if kind == TEXT:
        return cursor.read_texts(count)
    if kind not in SCALARS:  # also arrays of arrays, which no checkpoint has
        raise _HeaderError(f"the key {key!r:.80} is an array of the type {kind}")
    return NumberArray(SCALARS[kind], cursor.read(count * struct.calcsize(SCALARS[kind])))


def _get_alignment(values: dict[str, Any]) -> int:
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _HeaderError(f"general.alignment is {alignment!r:.40}, which is not a power of two")
    return alignment


def _read_locations(cursor: _Cursor, count: int, alignment: int, path: Path) -> dict[str, TensorLocation]:
    entries = []
    for _ in range(count):
        name, axes = cursor.read_name(), cursor.read_number("I")
        if not 1 <= axes <= MAX_AXES:
            raise _HeaderError(f"the tensor {name!r:.80} has {axes} axes")
        shape = tuple(cursor.read_number("Q") for _ in range(axes))[::-1]
        entries.append((name, shape, cursor.read_number("I"), cursor.read_number("Q")))
    start = -(-cursor.position // alignment) * alignment
    locations: dict[str, TensorLocation] = {}
    for name, shape, kind, offset in entries:
        if name in locations:
            raise _HeaderError(f"the tensor {name!r:.80} is repeated")
        if offset % alignment:
            raise _HeaderError(f"the tensor {name!r:.80} does not begin at a multiple of {alignment}")
        locations[name] = TensorLocation(kind, shape, start + offset, _count_bytes(name, shape, kind, path))
    return locations


def _count_bytes(name: str, shape: Sequence[int], kind: int, path: Path) -> int:
    """Return the bytes of a tensor of this shape and type."""
    try:
        numbers, size = get_block_size(kind)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {name!r:.80}: {error}") from error
    count = math.prod(shape)
    if not 0 < count < MAX_TENSOR_NUMBERS or shape[-1] % numbers:
        raise _HeaderError(f"the tensor {name!r:.80} has the impossible shape {tuple(shape)}")
    return count // numbers * size


def _check_locations(locations: dict[str, TensorLocation], size: int) -> None:
    """Check that every tensor is inside the file and that none overlap, so that no more than the file is ever read."""
    end, previous = 0, ""
    for name, location in sorted(locations.items(), key=lambda item: item[1].begin):
        if location.begin < end:
            raise _HeaderError(f"the tensors {previous!r:.80} and {name!r:.80} overlap")
        end, previous = location.begin + location.nbytes, name
        if end > size:
            raise _HeaderError(f"the tensor {name!r:.80} ends at byte {end}, the file has {size}")


class _Cursor:
    """A position in the header that only moves forward, and never past the end."""

    def __init__(self, data: mmap.mmap, *, whole: bool) -> None:
        self._data, self._whole = data, whole
        self.position = 0

    def read(self, count: int) -> bytes:
        """Read `count` bytes."""
        if count > len(self._data) - self.position:
            self._raise_past_end()
        self.position += count
        return self._data[self.position - count : self.position]

    def read_number(self, code: str) -> Any:
        """Read a number of this struct code."""
        return struct.unpack("<" + code, self.read(struct.calcsize(code)))[0]

    def read_text(self) -> bytes:
        """Read a text."""
        return self.read(self.read_number("Q"))

    def read_name(self) -> str:
        """Read a text, which must be short and UTF-8."""
        raw = self.read_text()
        try:
            if len(raw) <= MAX_NAME_BYTES:
                return raw.decode("utf-8")
        except UnicodeDecodeError:
            pass
        raise _HeaderError(f"{raw[:40]!r} is not a valid name")

    def read_texts(self, count: int) -> list[bytes]:
        """Read `count` texts. Unlike repeated calls of `read_text`, this is fast enough for 65536 of them."""
        if count > MAX_TEXTS:
            raise _HeaderError(f"an array claims {count} texts")
        data, position, last = self._data, self.position, len(self._data)
        texts = []
        for _ in range(count):
            if position + 8 > last:
                self._raise_past_end()
            start = position + 8
            position = start + LENGTH.unpack_from(data, position)[0]
            if position > last:
                self._raise_past_end()
            texts.append(data[start:position])
        self.position = position
        return texts

    def _raise_past_end(self) -> NoReturn:
        raise _HeaderError(
            "its header ends too early" if self._whole else f"its header claims over {MAX_HEADER_BYTES} bytes"
        )
