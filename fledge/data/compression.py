"""Read .xz, .gz, .bz2, .zst and uncompressed files as plain bytes, with one error class for all of them."""

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

BUFFER_BYTES = 1 << 18
ZSTD_READ_BYTES = 1 << 10  # compressed bytes of a .zst per step; they decompress to at most 32 MiB


class CompressionError(Exception):
    """A file cannot be read or decompressed. Callers catch it and raise an error that names the file."""


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    assert mode == "rb"
    try:
        import zstandard
    except ImportError:
        raise UsageError(f'{path}: .zst files need the package zstandard; pip install "fledge[data]"') from None
    return cast("IO[bytes]", io.BufferedReader(_ZstdReader(path, zstandard), BUFFER_BYTES))


class _ZstdReader(io.RawIOBase):
    """Reads the frames of a .zst file in order. A truncated frame is an error, not the end of the file."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._package = zstandard
        self._frame: Any = None
        self._compressed = b""
        self._plain = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (size := self._plain.readinto(buffer)):
            self._compressed = self._compressed or self._file.read(ZSTD_READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise CompressionError("the last frame is truncated")
                return 0
            try:
                self._frame = self._frame or self._package.ZstdDecompressor().decompressobj()
                plain, self._compressed = self._frame.decompress(self._compressed), b""
            except self._package.ZstdError as error:
                raise CompressionError(str(error)) from None
            if plain:
                self._plain = io.BytesIO(plain)
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": _open_zstd}


def is_compressed(path: Path) -> bool:
    """Whether the suffix is one of a compressed file."""
    return path.suffix in OPENERS


def get_plain_suffix(path: Path) -> str:
    """The suffix before the compression suffix: ".jsonl" for "a.jsonl.xz"."""
    return Path(path.stem).suffix if is_compressed(path) else path.suffix


def get_plain_stem(path: Path) -> str:
    """The name without the suffixes of format and compression: "a" for "a.jsonl.xz"."""
    return Path(path.stem).stem if is_compressed(path) else path.stem


@contextmanager
def open_decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file as plain bytes. Inside the block, errors of reading and decompressing raise `CompressionError`."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise CompressionError(str(error)) from None
    except OSError as error:  # includes gzip.BadGzipFile
        raise CompressionError(error.strerror or str(error)) from None
