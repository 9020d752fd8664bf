"""Shards: cleaned documents on disk, with the data from which later stages decide without reading the text.

A shard is a folder with

    text.bin          UTF-8 of all parts, concatenated
    parts.npy         PART_DTYPE: the position, document and kind of each part; only a long document has several parts
    documents.npy     DOCUMENT_DTYPE: hashes, size and kind of each document
    kinds.json        [language, source] of each kind
    signatures.npy    (documents, permutations) uint32; only for near deduplication
    bands.npy         BAND_DTYPE: (hash, document), sorted by hash; only for near deduplication
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fledge.core.files import read_json, write_json
from fledge.data.pipeline.dedup.minhash import MinHasher, hash_exact, normalize_text
from fledge.data.pipeline.stage_outputs import StageContext, list_finished, load_array, save_array

SHARD_BYTES = 64_000_000  # bytes of text after which a new shard begins
BATCH_CHARACTERS = 200_000  # characters whose signatures are computed at once; they fit in the cache of a core

PART_DTYPE = np.dtype([("start", "<u8"), ("size", "<u4"), ("document", "<u4"), ("part", "<u4"), ("kind", "<u2")])
DOCUMENT_DTYPE = np.dtype([("hash", "<u8"), ("hash2", "<u8"), ("bytes", "<u8"), ("kind", "<u2")])
BAND_DTYPE = np.dtype([("hash", "<u8"), ("document", "<u4")])
MAX_KINDS = 60_000  # kinds in one shard; their numbers have 16 bits

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Shard:
    """One shard, whose files are read on access. `number` is its position among all shards of a build."""

    folder: Path
    number: int

    @property
    def name(self) -> str:
        """The name of the outputs that later stages make from this shard."""
        return f"{self.number:09}"

    @property
    def parts(self) -> Array:
        """PART_DTYPE of each part, in the order of the text."""
        return load_array(self.folder / "parts.npy")

    @property
    def documents(self) -> Array:
        """DOCUMENT_DTYPE of each document."""
        return load_array(self.folder / "documents.npy")

    @property
    def bands(self) -> Array:
        """BAND_DTYPE, sorted by hash."""
        return load_array(self.folder / "bands.npy")

    @property
    def signatures(self) -> Array:
        """(documents, permutations) uint32."""
        return load_array(self.folder / "signatures.npy")

    @cached_property
    def kinds(self) -> list[tuple[str, str]]:
        """(language, source) of each kind."""
        return [(language, source) for language, source in read_json(self.folder / "kinds.json")]

    def global_ids(self, documents: Array) -> Array:
        """The ids of these documents among all documents of a build (uint64). They increase in reading order."""
        return documents.astype(np.uint64) | np.uint64(self.number << 32)

    def open_text(self) -> IO[bytes]:
        """Open the text of all parts."""
        return open(self.folder / "text.bin", "rb")


def list_shards(context: StageContext) -> list[Shard]:
    """All shards of a finished read stage, in order."""
    return _list_shards_in(context.folder("read"))


@lru_cache(maxsize=4)
def _list_shards_in(folder: Path) -> list[Shard]:
    folders = [shard for output in list_finished(folder) for shard in sorted(output.glob("shard-*"))]
    return [Shard(shard, number) for number, shard in enumerate(folders)]


class ShardWriter:
    """Writes documents as shards into the folder of one slice."""

    def __init__(self, folder: Path, minhasher: MinHasher | None, max_part_characters: int) -> None:
        """minhasher: None without near deduplication. max_part_characters: 0 never splits a document."""
        self._folder, self._minhasher, self._max_part_characters = folder, minhasher, max_part_characters
        self._number = 0
        self._unsigned: list[str] = []  # normalized texts without a signature
        self._unsigned_characters = 0
        self._open()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._close()
        self._text.close()

    def _open(self) -> None:
        self._shard_folder = self._folder / f"shard-{self._number:05}"
        self._shard_folder.mkdir()
        self._text: IO[bytes] = open(self._shard_folder / "text.bin", "wb")  # noqa: SIM115 - closed by _close()
        self._size = 0
        self._kinds: dict[tuple[str, str], int] = {}
        self._parts: list[tuple[int, ...]] = []
        self._documents: list[tuple[int, ...]] = []
        self._signatures: list[Array] = []
        self._bands: list[Array] = []

    def add(self, text: str, language: str, source: str) -> None:
        """Add one cleaned document."""
        normalized = normalize_text(text)
        number = len(self._documents)
        kind = self._kinds.setdefault((language, source), len(self._kinds))
        start = self._size
        for part, part_text in enumerate(split_text(text, self._max_part_characters)):
            data = part_text.encode()
            self._text.write(data)
            self._parts.append((self._size, len(data), number, part, kind))
            self._size += len(data)
        self._documents.append((*hash_exact(normalized), self._size - start, kind))
        if self._minhasher is not None:
            self._unsigned.append(normalized)
            self._unsigned_characters += len(normalized)
            if self._unsigned_characters >= BATCH_CHARACTERS:
                self._compute_signatures()
        if self._size >= SHARD_BYTES or len(self._kinds) >= MAX_KINDS:
            self._close()
            self._number += 1
            self._open()

    def _compute_signatures(self) -> None:
        assert self._minhasher is not None
        if not self._unsigned:
            return
        first = len(self._documents) - len(self._unsigned)
        signatures, has_shingles = self._minhasher.compute_signatures(self._unsigned)
        hashes = self._minhasher.compute_band_hashes(signatures[has_shingles])
        numbers = (first + np.flatnonzero(has_shingles)).repeat(self._minhasher.bands)
        bands = np.empty(hashes.size, dtype=BAND_DTYPE)
        bands["hash"], bands["document"] = hashes.reshape(-1), numbers
        self._signatures.append(signatures)
        self._bands.append(bands)
        self._unsigned, self._unsigned_characters = [], 0

    def _close(self) -> None:
        """Write the arrays of the shard, or remove a shard without documents."""
        self._text.close()
        if not self._documents:
            (self._shard_folder / "text.bin").unlink()
            self._shard_folder.rmdir()
            return
        save_array(self._shard_folder / "parts.npy", np.array(self._parts, dtype=PART_DTYPE))
        save_array(self._shard_folder / "documents.npy", np.array(self._documents, dtype=DOCUMENT_DTYPE))
        write_json(self._shard_folder / "kinds.json", list(self._kinds))
        if self._minhasher is not None:
            self._compute_signatures()
            bands = np.concatenate(self._bands)
            save_array(self._shard_folder / "bands.npy", bands[np.argsort(bands["hash"], kind="stable")])
            save_array(self._shard_folder / "signatures.npy", np.concatenate(self._signatures))


def split_text(text: str, limit: int) -> list[str]:
    """Split a text into parts of at most `limit` characters (0: no limit), if possible at the end of a line or word."""
    if not limit or len(text) <= limit:
        return [text]
    parts, start = [], 0
    while len(text) - start > limit:
        end = start + limit
        for mark in ("\n", " "):
            position = text.rfind(mark, start + limit - limit // 4, end)
            if position >= 0:
                end = position + 1
                break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]
