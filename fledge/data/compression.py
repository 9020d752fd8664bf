"""Files that may be compressed: opened as plain bytes, whatever packed them.

Here: .xz, .gz, .bz2 and .zst, and one kind of error for all of them. Not here: what the bytes mean.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from fledge.core.errors import UsageError

BLOCK = 1 << 18
PACKED = 1 << 10  # bytes of a .zst that are unpacked at once; at the worst they become 32 MiB


class CompressionError(Exception):
    """A file cannot be read, or what is read cannot be unpacked. Never leaves the room: readers name the place."""


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    assert mode == "rb"
    try:
        import zstandard
    except ImportError:
        raise UsageError(f'{path}: .zst files need the package zstandard; pip install "fledge[data]"') from None
    return cast("IO[bytes]", io.BufferedReader(_Zstd(path, zstandard), BLOCK))


class _Zstd(io.RawIOBase):
    """The frames of a .zst file, one after the other. A frame without its end is an error, not the end of the file."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._package = zstandard
        self._frame: Any = None
        self._packed = b""
        self._plain = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (size := self._plain.readinto(buffer)):
            self._packed = self._packed or self._file.read(PACKED)
            if not self._packed:
                if self._frame is not None:
                    raise CompressionError("the last frame ends too early")
                return 0
            try:
                self._frame = self._frame or self._package.ZstdDecompressor().decompressobj()
                plain, self._packed = self._frame.decompress(self._packed), b""
            except self._package.ZstdError as error:
                raise CompressionError(str(error)) from None
            if plain:
                self._plain = io.BytesIO(plain)
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": _open_zstd}


def is_compressed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix in OPENERS


def plain_suffix(path: Path) -> str:
    """The suffix without that of a compression: ".jsonl" of "a.jsonl.xz"."""
    return Path(path.stem).suffix if is_compressed(path) else path.suffix


def plain_stem(path: Path) -> str:
    """The name without the suffixes of kind and compression: "a" of "a.jsonl.xz"."""
    return Path(path.stem).stem if is_compressed(path) else path.stem


@contextmanager
def open_plain(path: Path) -> Iterator[IO[bytes]]:
    """The plain bytes of a file, in a block in which whatever is wrong with the file raises `CompressionError`."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise CompressionError(str(error)) from None
    except OSError as error:  # gzip.BadGzipFile among them
        raise CompressionError(error.strerror or str(error)) from None
