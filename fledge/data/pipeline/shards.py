"""Shards: cleaned documents on disk with what later stages decide by, so that those never touch the text.

A shard is a folder with

    text.bin          UTF-8 of all parts, one behind the other
    parts.npy         PART: a document, or a part of a long one: where its text is, and its document and kind
    documents.npy     DOCUMENT: hashes of whole documents
    kinds.json        [language, source] of each kind
    signatures.npy    (documents, permutations), where near copies are looked for
    bands.npy         BAND: (hash, document) sorted by hash

Here: writing and reading that. Not here: any decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fledge.core.files import read_json, write_json
from fledge.data.pipeline.dedup.minhash import MinHasher, exact_hash, normalized
from fledge.data.pipeline.stage_outputs import StageContext, finished, load_array, save_array

SHARD_BYTES = 64_000_000  # of text, after which another shard begins
BATCH_CHARACTERS = 200_000  # that are signed at a time: few enough for a core's cache

PART = np.dtype([("start", "<u8"), ("size", "<u4"), ("document", "<u4"), ("part", "<u4"), ("kind", "<u2")])
DOCUMENT = np.dtype([("hash", "<u8"), ("hash2", "<u8"), ("bytes", "<u8"), ("kind", "<u2")])
BAND = np.dtype([("hash", "<u8"), ("document", "<u4")])
KINDS = 60_000  # in one shard, so that a number of 16 bits names them

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Shard:
    """One shard, read as far as it is asked for. `number` counts all shards of a build in their order."""

    folder: Path
    number: int

    @property
    def name(self) -> str:
        """Of the files that later stages make from it."""
        return f"{self.number:09}"

    @property
    def parts(self) -> Array:
        """PART of each part, in the order of the texts."""
        return load_array(self.folder / "parts.npy")

    @property
    def documents(self) -> Array:
        """DOCUMENT of each document."""
        return load_array(self.folder / "documents.npy")

    @property
    def bands(self) -> Array:
        """BAND, sorted by hash."""
        return load_array(self.folder / "bands.npy")

    @property
    def signatures(self) -> Array:
        """(documents, permutations)."""
        return load_array(self.folder / "signatures.npy")

    @cached_property
    def kinds(self) -> list[tuple[str, str]]:
        """(language, source) by number."""
        return [(language, source) for language, source in read_json(self.folder / "kinds.json")]

    def ids(self, documents: Array) -> Array:
        """Numbers of these documents among all of a build; they rise in the order of reading."""
        return documents.astype(np.uint64) | np.uint64(self.number << 32)

    def open_text(self) -> IO[bytes]:
        """The text of all parts."""
        return open(self.folder / "text.bin", "rb")


def shards(job: StageContext) -> list[Shard]:
    """All shards of a finished reading stage, in order."""
    return _shards(job.folder("read"))


@lru_cache(maxsize=4)
def _shards(folder: Path) -> list[Shard]:
    folders = [shard for piece in finished(folder) for shard in sorted(piece.glob("shard-*"))]
    return [Shard(shard, number) for number, shard in enumerate(folders)]


class ShardWriter:
    """Documents in, shards out, in the folder of one slice."""

    def __init__(self, folder: Path, signer: MinHasher | None, cut: int) -> None:
        self._folder, self._signer, self._cut = folder, signer, cut
        self._number = 0
        self._waiting: list[str] = []  # normalized texts that are not signed yet
        self._waiting_characters = 0
        self._open()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._close()
        self._text.close()

    def _open(self) -> None:
        self._place = self._folder / f"shard-{self._number:05}"
        self._place.mkdir()
        self._text: IO[bytes] = open(self._place / "text.bin", "wb")  # noqa: SIM115 - closed by close()
        self._size = 0
        self._kinds: dict[tuple[str, str], int] = {}
        self._parts: list[tuple[int, ...]] = []
        self._documents: list[tuple[int, ...]] = []
        self._signatures: list[Array] = []
        self._bands: list[Array] = []

    def add(self, text: str, language: str, source: str) -> None:
        """One cleaned document."""
        compared = normalized(text)
        number = len(self._documents)
        kind = self._kinds.setdefault((language, source), len(self._kinds))
        start = self._size
        for part, piece in enumerate(parts_of(text, self._cut)):
            data = piece.encode()
            self._text.write(data)
            self._parts.append((self._size, len(data), number, part, kind))
            self._size += len(data)
        self._documents.append((*exact_hash(compared), self._size - start, kind))
        if self._signer is not None:
            self._waiting.append(compared)
            self._waiting_characters += len(compared)
            if self._waiting_characters >= BATCH_CHARACTERS:
                self._sign()
        if self._size >= SHARD_BYTES or len(self._kinds) >= KINDS:
            self._close()
            self._number += 1
            self._open()

    def _sign(self) -> None:
        assert self._signer is not None
        if not self._waiting:
            return
        first = len(self._documents) - len(self._waiting)
        signatures, long = self._signer.signatures(self._waiting)
        hashes = self._signer.band_hashes(signatures[long])
        numbers = (first + np.flatnonzero(long)).repeat(self._signer.bands)
        bands = np.empty(hashes.size, dtype=BAND)
        bands["hash"], bands["document"] = hashes.reshape(-1), numbers
        self._signatures.append(signatures)
        self._bands.append(bands)
        self._waiting, self._waiting_characters = [], 0

    def _close(self) -> None:
        """Write what describes the texts. A shard without a document vanishes."""
        self._text.close()
        if not self._documents:
            (self._place / "text.bin").unlink()
            self._place.rmdir()
            return
        save_array(self._place / "parts.npy", np.array(self._parts, dtype=PART))
        save_array(self._place / "documents.npy", np.array(self._documents, dtype=DOCUMENT))
        write_json(self._place / "kinds.json", list(self._kinds))
        if self._signer is not None:
            self._sign()
            bands = np.concatenate(self._bands)
            save_array(self._place / "bands.npy", bands[np.argsort(bands["hash"], kind="stable")])
            save_array(self._place / "signatures.npy", np.concatenate(self._signatures))


def parts_of(text: str, limit: int) -> list[str]:
    """A text in parts of at most `limit` characters, which end at a line's or word's end where one is near."""
    if not limit or len(text) <= limit:
        return [text]
    parts, start = [], 0
    while len(text) - start > limit:
        end = start + limit
        for mark in ("\n", " "):
            found = text.rfind(mark, start + limit - limit // 4, end)
            if found >= 0:
                end = found + 1
                break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]
