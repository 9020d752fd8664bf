"""binidx: token ids in X.bin, and the position of each document in X.idx. What RWKV-LM trains from and Megatron has
made.

X.bin is nothing but ids. X.idx is, little-endian:

    9 bytes      "MMIDIDX" and two zero bytes
    u64          1, the version
    u8           the type of ids, see TYPES
    u64          N, how many documents
    u64          M, how many document boundaries
    N x i32      ids in each document
    N x i64      where each begins in X.bin, in bytes
    M x i64      boundaries as document numbers, from 0 to N

Nothing is read but the index; the ids are mapped. Here: reading, which believes nothing, and writing, which appears
whole or not at all. Not here: what ids mean (store.py).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fledge.core.errors import DataError
from fledge.core.files import atomic_path

Array = npt.NDArray[Any]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in TYPES.items()}
BLOCK = 1 << 20


def files_of(prefix: Path) -> tuple[Path, Path]:
    """(X.bin, X.idx) of X, X.bin or X.idx."""
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


class BinIdx:
    """The documents of a pair of files: `len`, one by number, and all ids one behind the other."""

    def __init__(self, prefix: Path) -> None:
        """Raises DataError, naming the file, for whatever is not as the format asks."""
        self.bin, self.idx = files_of(prefix)
        for path in (self.bin, self.idx):
            if not path.is_file():
                raise DataError(f"{path}: there is no such file; a token store has a .bin and an .idx")
        self.dtype, count, boundaries = self._header()
        start = HEADER.size
        self.sizes = _mapped(self.idx, "<i4", start, count)
        self.pointers = _mapped(self.idx, "<i8", start + 4 * count, count)
        self.boundaries = _mapped(self.idx, "<i8", start + 12 * count, boundaries)
        self._check()
        self.tokens = _mapped(self.bin, self.dtype, 0, self.bin.stat().st_size // self.dtype.itemsize)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> Array:
        """The ids of document `number`, with its separator where it has one."""
        start = int(self.pointers[number]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[number])]

    def _header(self) -> tuple[np.dtype[Any], int, int]:
        size = self.idx.stat().st_size
        with open(self.idx, "rb") as file:
            raw = file.read(HEADER.size)
        if len(raw) < HEADER.size:
            raise DataError(f"{self.idx}: {size} bytes are no binidx index, whose header has {HEADER.size}")
        magic, version, code, count, boundaries = HEADER.unpack(raw)
        if magic != MAGIC:
            raise DataError(f"{self.idx}: not a binidx index: it begins with {magic!r}, not with {MAGIC!r}")
        if version != VERSION:
            raise DataError(f"{self.idx}: binidx version {version} is unknown; only version 1 is")
        if code not in TYPES:
            kind = "floating point, which ids cannot be" if code in (6, 7) else "unknown"
            known = ", ".join(f"{known} {np.dtype(name).name}" for known, name in TYPES.items())
            raise DataError(f"{self.idx}: dtype code {code} is {kind}; codes: {known}")
        expected = HEADER.size + 12 * count + 8 * boundaries
        if size != expected:
            what = "cut off" if size < expected else "too long"
            asked = f"{count} documents and {boundaries} boundaries take {expected} bytes"
            raise DataError(f"{self.idx}: {what}: {asked}, it has {size}")
        return np.dtype(TYPES[code]), count, boundaries

    def _check(self) -> None:
        """Every document is within the file, and the boundaries increase from 0 to the number of documents."""
        size, width = self.bin.stat().st_size, self.dtype.itemsize
        if size % width:
            raise DataError(f"{self.bin}: {size} bytes are no whole number of {self.dtype.name} ids")
        for start in range(0, len(self), BLOCK):
            sizes = self.sizes[start : start + BLOCK].astype(np.int64)
            pointers = self.pointers[start : start + BLOCK].astype(np.int64)
            wrong = (sizes < 0) | (pointers < 0) | (pointers > size) | (pointers % width != 0)
            wrong |= sizes > (size - np.where(wrong, 0, pointers)) // width
            if wrong.any():
                at = int(np.argmax(wrong))
                raise DataError(
                    f"{self.idx}: document {start + at} has {sizes[at]} ids from byte {pointers[at]} on, which do not "
                    f"fit in {self.bin.name} of {size} bytes; is one of the files cut off, or of another pair?"
                )
        ends = self.boundaries
        if len(ends) and (ends[0] != 0 or ends[-1] != len(self) or (len(ends) > 1 and (np.diff(ends) < 0).any())):
            raise DataError(f"{self.idx}: the document boundaries do not rise from 0 to {len(self)}")


def _mapped(path: Path, dtype: npt.DTypeLike, offset: int, count: int) -> Array:
    if not count:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


class BinIdxWriter:
    """Documents in, one after the other. Memory does not grow with them."""

    def __init__(self, file: IO[bytes], index: IO[bytes], dtype: np.dtype[Any]) -> None:
        self._bin, self._idx, self.dtype = file, index, dtype
        self._digest = hashlib.sha256()
        self.documents = self.tokens = 0
        self._idx.write(bytes(HEADER.size))

    @property
    def sha256(self) -> str:
        """Of all ids so far, as they are in the .bin."""
        return self._digest.hexdigest()

    def add(self, ids: npt.ArrayLike) -> None:
        """One document, with its separator if it is to have one. Raises DataError for ids the type cannot hold."""
        array = np.asarray(ids)
        self.add_many(array, np.array([array.size]))

    def add_many(self, ids: Array, sizes: Array) -> None:
        """Several documents: their ids one behind the other, and how many each has."""
        info = np.iinfo(self.dtype)
        if ids.size and not (info.min <= ids.min() and ids.max() <= info.max):
            raise DataError(f"token id {ids.max()} does not fit a store of {self.dtype.name}, which ends at {info.max}")
        if int(sizes.sum()) != ids.size:
            raise DataError(f"documents of {sizes.sum()} tokens cannot be cut from {ids.size}")
        data = np.ascontiguousarray(ids, dtype=self.dtype).tobytes()
        self._bin.write(data)
        self._digest.update(data)
        self._idx.write(np.asarray(sizes, dtype="<i4").tobytes())
        self.documents += len(sizes)
        self.tokens += ids.size

    def _finish(self) -> None:
        """Behind the sizes come the pointers they add up to, and the boundaries; then the header can be right."""
        at = 0
        for start in range(0, self.documents, BLOCK):
            self._idx.seek(HEADER.size + 4 * start)
            raw = self._idx.read(4 * min(BLOCK, self.documents - start))
            sizes = np.frombuffer(raw, dtype="<i4").astype(np.int64) * self.dtype.itemsize
            ends = at + np.cumsum(sizes)
            self._idx.seek(0, os.SEEK_END)
            self._idx.write((ends - sizes).astype("<i8").tobytes())
            at = int(ends[-1])
        self._idx.seek(0, os.SEEK_END)
        for start in range(0, self.documents + 1, BLOCK):
            self._idx.write(np.arange(start, min(start + BLOCK, self.documents + 1), dtype="<i8").tobytes())
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.documents, self.documents + 1))


@contextmanager
def writing(prefix: Path, dtype: npt.DTypeLike) -> Iterator[BinIdxWriter]:
    """A writer of X.bin and X.idx, which are there when the block has ended well, and only then."""
    kind = np.dtype(dtype).newbyteorder("<")
    if kind not in CODES:
        raise DataError(f"a store cannot hold ids of type {kind.name}; types: {', '.join(TYPES.values())}")
    bin_path, idx_path = files_of(prefix)
    with ExitStack() as stack:
        index = stack.enter_context(atomic_path(idx_path))  # replaced last
        tokens = stack.enter_context(atomic_path(bin_path))
        with open(tokens, "wb") as file, open(index, "w+b") as index_file:
            writer = BinIdxWriter(file, index_file, kind)
            yield writer
            writer._finish()
