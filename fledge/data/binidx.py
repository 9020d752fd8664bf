"""The binidx format: token ids in X.bin, the position of each document in X.idx. RWKV-LM and Megatron use it too.

X.bin contains only ids. X.idx contains, little-endian:

    9 bytes      "MMIDIDX" and two zero bytes
    u64          1, the version
    u8           the type of the ids, see DTYPES
    u64          N, the number of documents
    u64          M, the number of document boundaries
    N x i32      number of ids of each document
    N x i64      position of each document in X.bin, in bytes
    M x i64      boundaries as document numbers, from 0 to N

Reading validates the whole index and maps the ids into memory without reading them. Writing is atomic: the files appear
only when they are complete.
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
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
DTYPE_CODES = {np.dtype(name): code for code, name in DTYPES.items()}
BLOCK_DOCUMENTS = 1 << 20  # documents whose index entries are checked or written at once


def get_binidx_paths(prefix: Path) -> tuple[Path, Path]:
    """(X.bin, X.idx) for the name X, X.bin or X.idx."""
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


class BinIdx:
    """The documents of a pair of files: their number (`len`), one document by index, and all ids in one array."""

    def __init__(self, prefix: Path) -> None:
        """Open X, X.bin or X.idx. Raises DataError with the name of a file that is missing or invalid."""
        self.bin_path, self.idx_path = get_binidx_paths(prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise DataError(f"{path}: there is no such file; a token store needs a .bin and an .idx file")
        self.dtype, count, boundaries = self._read_header()
        start = HEADER.size
        self.sizes = _map_array(self.idx_path, "<i4", start, count)
        self.pointers = _map_array(self.idx_path, "<i8", start + 4 * count, count)
        self.boundaries = _map_array(self.idx_path, "<i8", start + 12 * count, boundaries)
        self._check_index()
        self.tokens = _map_array(self.bin_path, self.dtype, 0, self.bin_path.stat().st_size // self.dtype.itemsize)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> Array:
        """The ids of document `number`, including its separator if it has one."""
        start = int(self.pointers[number]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[number])]

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as file:
            raw = file.read(HEADER.size)
        if len(raw) < HEADER.size:
            raise DataError(f"{self.idx_path}: {size} bytes are no binidx index; a header has {HEADER.size}")
        magic, version, code, count, boundaries = HEADER.unpack(raw)
        if magic != MAGIC:
            raise DataError(f"{self.idx_path}: not a binidx index: it begins with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise DataError(f"{self.idx_path}: binidx version {version} is not supported; version 1 is")
        if code not in DTYPES:
            problem = "is floating point; ids must be integers" if code in (6, 7) else "is unknown"
            supported = ", ".join(f"{number} {np.dtype(name).name}" for number, name in DTYPES.items())
            raise DataError(f"{self.idx_path}: dtype code {code} {problem}; supported codes: {supported}")
        expected = HEADER.size + 12 * count + 8 * boundaries
        if size != expected:
            problem = "truncated" if size < expected else "too long"
            layout = f"{count} documents and {boundaries} boundaries need {expected} bytes"
            raise DataError(f"{self.idx_path}: {problem}: {layout}, the file has {size}")
        return np.dtype(DTYPES[code]), count, boundaries

    def _check_index(self) -> None:
        """Check that all documents are within the file and the boundaries increase from 0 to the document count."""
        size, width = self.bin_path.stat().st_size, self.dtype.itemsize
        if size % width:
            raise DataError(f"{self.bin_path}: {size} bytes are not a multiple of the size of a {self.dtype.name} id")
        for start in range(0, len(self), BLOCK_DOCUMENTS):
            sizes = self.sizes[start : start + BLOCK_DOCUMENTS].astype(np.int64)
            pointers = self.pointers[start : start + BLOCK_DOCUMENTS].astype(np.int64)
            invalid = (sizes < 0) | (pointers < 0) | (pointers > size) | (pointers % width != 0)
            invalid |= sizes > (size - np.where(invalid, 0, pointers)) // width
            if invalid.any():
                first = int(np.argmax(invalid))
                raise DataError(
                    f"{self.idx_path}: document {start + first} has {sizes[first]} ids from byte {pointers[first]}, "
                    f"outside {self.bin_path.name} of {size} bytes; is one file truncated or from another pair?"
                )
        ends = self.boundaries
        if len(ends) and (ends[0] != 0 or ends[-1] != len(self) or (len(ends) > 1 and (np.diff(ends) < 0).any())):
            raise DataError(f"{self.idx_path}: the document boundaries do not increase from 0 to {len(self)}")


def _map_array(path: Path, dtype: npt.DTypeLike, offset: int, count: int) -> Array:
    if not count:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


class BinIdxWriter:
    """Writes documents to an open pair of files. Memory use does not depend on their number."""

    def __init__(self, file: IO[bytes], index: IO[bytes], dtype: np.dtype[Any]) -> None:
        self._bin, self._idx, self.dtype = file, index, dtype
        self._digest = hashlib.sha256()
        self.documents = self.tokens = 0
        self._idx.write(bytes(HEADER.size))

    @property
    def sha256(self) -> str:
        """SHA-256 of all ids so far, as in the .bin file."""
        return self._digest.hexdigest()

    def add(self, ids: npt.ArrayLike) -> None:
        """Write one document, including its separator if any. Raises DataError for ids outside the type's range."""
        array = np.asarray(ids)
        self.add_many(array, np.array([array.size]))

    def add_many(self, ids: Array, sizes: Array) -> None:
        """Write several documents.

        ids: the ids of all documents, concatenated. sizes: the number of ids of each document.
        """
        info = np.iinfo(self.dtype)
        if ids.size and not (info.min <= ids.min() and ids.max() <= info.max):
            raise DataError(f"token id {ids.max()} does not fit a store of {self.dtype.name} ids, at most {info.max}")
        if int(sizes.sum()) != ids.size:
            raise DataError(f"the sizes of the documents add up to {sizes.sum()}, but there are {ids.size} ids")
        data = np.ascontiguousarray(ids, dtype=self.dtype).tobytes()
        self._bin.write(data)
        self._digest.update(data)
        self._idx.write(np.asarray(sizes, dtype="<i4").tobytes())
        self.documents += len(sizes)
        self.tokens += ids.size

    def _finish(self) -> None:
        """Append the pointers, which are sums of the sizes, and the boundaries, then write the header."""
        position = 0
        for start in range(0, self.documents, BLOCK_DOCUMENTS):
            self._idx.seek(HEADER.size + 4 * start)
            raw = self._idx.read(4 * min(BLOCK_DOCUMENTS, self.documents - start))
            sizes = np.frombuffer(raw, dtype="<i4").astype(np.int64) * self.dtype.itemsize
            ends = position + np.cumsum(sizes)
            self._idx.seek(0, os.SEEK_END)
            self._idx.write((ends - sizes).astype("<i8").tobytes())
            position = int(ends[-1])
        self._idx.seek(0, os.SEEK_END)
        for start in range(0, self.documents + 1, BLOCK_DOCUMENTS):
            self._idx.write(np.arange(start, min(start + BLOCK_DOCUMENTS, self.documents + 1), dtype="<i8").tobytes())
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype], self.documents, self.documents + 1))


@contextmanager
def open_binidx_writer(prefix: Path, dtype: npt.DTypeLike) -> Iterator[BinIdxWriter]:
    """A writer of X.bin and X.idx. The files appear when the block ends without an error."""
    id_dtype = np.dtype(dtype).newbyteorder("<")
    if id_dtype not in DTYPE_CODES:
        raise DataError(f"a store cannot hold ids of type {id_dtype.name}; types: {', '.join(DTYPES.values())}")
    bin_path, idx_path = get_binidx_paths(prefix)
    with ExitStack() as stack:
        index = stack.enter_context(atomic_path(idx_path))  # replaced last
        tokens = stack.enter_context(atomic_path(bin_path))
        with open(tokens, "wb") as file, open(index, "w+b") as index_file:
            writer = BinIdxWriter(file, index_file, id_dtype)
            yield writer
            writer._finish()
