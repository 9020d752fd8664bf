"""The files of the disk cache: one file per snapshot and an SQLite index.

    lock           held while the store is open
    index.sqlite   one row per snapshot; namespaces and token ids only as SHA-256, since both may be secrets
    states/        <random name>.safetensors: the float32 tensors of a state, and `logits` if they are known

Every row has a checksum of its file. A damaged index is set aside and replaced by an empty one, because snapshots can
be computed again. `read` may run at the same time as another method; all other methods need one thread at a time.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import secrets
import sqlite3
import zlib
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fledge.core.sqlite_store import IndexSchema, SqliteStore
from fledge.models.state import KIND, KINDS, State

log = logging.getLogger("fledge")

DTYPE = "float32"
LOGITS = "logits"
MAX_USE_COUNT = 1 << 62  # a column holds 63 bits

TABLE = """
CREATE TABLE IF NOT EXISTS snapshots (
    identity TEXT, space BLOB, ids BLOB, anchor BLOB, length INTEGER, file TEXT, size INTEGER, checksum INTEGER,
    kind TEXT, dtype TEXT, logits INTEGER, used INTEGER, PRIMARY KEY (identity, space, ids)
) WITHOUT ROWID
"""
COLUMNS = "identity, space, ids, anchor, length, file, size, checksum, kind, dtype, logits, used"
KEY = "identity = ? AND space = ? AND ids = ?"


class Snapshot(NamedTuple):
    """The state of one sequence, and the logits of the next token if they are known."""

    state: State
    logits: Tensor | None  # (V,) float32

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.state.nbytes + (0 if self.logits is None else self.logits.numel() * self.logits.element_size())


@dataclass
class SnapshotRecord:
    """A row of the index: its fields are the columns of the table, in order."""

    identity: str  # of the model
    namespace_hash: bytes  # SHA-256, as are the next two
    ids_hash: bytes  # of all tokens
    anchor_hash: bytes  # of the tokens up to the last complete block; the longest prefix is found by it
    length: int  # tokens
    file: str = ""  # empty until the file is written
    size: int = 0  # bytes of the file
    checksum: int = 0  # CRC-32 of the file
    state_class: str = ""
    dtype: str = DTYPE
    has_logits: int = 0
    last_used: int = 0  # a counter that every use increments, so that changes of the clock do no harm

    @property
    def key(self) -> tuple[str, bytes, bytes]:
        """The primary key of the row."""
        return self.identity, self.namespace_hash, self.ids_hash


FIELDS = dataclasses.fields(SnapshotRecord)


class SnapshotStore(SqliteStore):
    """An open folder of snapshots. `records` are the rows found when it was opened, least recently used first."""

    INDEX = "index.sqlite"
    SCHEMA = IndexSchema((TABLE,), version=1, is_durable=False)
    OWN_FILES = re.compile(r"[0-9a-f]{32}\.safetensors|\.[0-9a-f]{32}\.safetensors\..*\.part")
    CONTENT = "snapshots"

    records: list[SnapshotRecord]

    def write(self, record: SnapshotRecord, data: bytes) -> SnapshotRecord:
        """Write a file and its row, replacing the row with the same key. Returns the record with the file's fields."""
        name = f"{secrets.token_hex(16)}.safetensors"
        written = dataclasses.replace(record, file=name, size=len(data), checksum=zlib.crc32(data))
        self._write_file(name, data)
        placeholders = ", ".join("?" * len(FIELDS))
        try:
            with self._index:
                self._index.execute(
                    f"INSERT OR REPLACE INTO snapshots ({COLUMNS}) VALUES ({placeholders})",
                    dataclasses.astuple(written),
                )
        except BaseException:
            self._delete_files([name])
            raise
        if record.file:
            self._delete_files([record.file])
        return written

    def read(self, record: SnapshotRecord) -> Snapshot | None:
        """The snapshot of a record, on the CPU; None if its file is missing or damaged."""
        try:
            data = (self._files / record.file).read_bytes()
            if len(data) != record.size or zlib.crc32(data) != record.checksum:
                return None
            tensors = safetensors.torch.load(data)
            logits = tensors.pop(LOGITS) if record.has_logits else None
            return Snapshot(KINDS[record.state_class](**tensors), logits)
        except (OSError, SafetensorError, KeyError, TypeError):
            return None

    def remove(self, records: Iterable[SnapshotRecord]) -> None:
        """Delete rows, then their files. The files are deleted even if the disk is too full to change the index."""
        records = list(records)
        try:
            self._delete_rows(records)
        finally:  # a row without its file is a miss, and is deleted when the store is opened again
            self._delete_files(record.file for record in records if record.file)

    def touch(self, records: Iterable[SnapshotRecord]) -> None:
        """Store when the records were last used."""
        with self._index:
            self._index.executemany(
                f"UPDATE snapshots SET used = ? WHERE {KEY}", [(record.last_used, *record.key) for record in records]
            )

    def _connect(self) -> sqlite3.Connection:
        """The index; a damaged one, or one of another version, is set aside and replaced."""
        path = self.folder / self.INDEX
        try:
            return self._connect_and_read(path)
        except sqlite3.Error as error:
            # A full or failing disk raises similar errors as a damaged file. Then no new index can be made either.
            replacement, damaged = path.with_suffix(".new"), path.with_suffix(".damaged")
            _delete_index(replacement)
            self._connect_and_read(replacement).close()
            os.replace(path, damaged)
            _delete_index(path)
            os.replace(replacement, path)
            log.warning(
                "%s cannot be read (%s); it was renamed to %s, and the snapshots in it are lost",
                path,
                error,
                damaged.name,
            )
            return self._connect_and_read(path)

    def _connect_and_read(self, path: Path) -> sqlite3.Connection:
        with ExitStack() as stack:
            index = stack.enter_context(closing(self.SCHEMA.connect(path)))
            index.text_factory = lambda data: data.decode(errors="replace")
            rows = index.execute(f"SELECT {COLUMNS} FROM snapshots ORDER BY used")
            self.records = [SnapshotRecord(*row) for row in rows]
            stack.pop_all()
        return index

    def _load(self) -> None:
        """Keep the rows whose file exists with the right size; delete other rows, and own files without a row."""
        sizes = self._own_files()
        valid = [record for record in self.records if _is_valid(record) and sizes.get(record.file) == record.size]
        names = {record.file for record in valid}
        self._delete_rows(record for record in self.records if record.file not in names)
        self._delete_files(sizes.keys() - names)
        self.records = valid

    def _delete_rows(self, records: Iterable[SnapshotRecord]) -> None:
        with self._index:
            self._index.executemany(f"DELETE FROM snapshots WHERE {KEY}", [record.key for record in records])


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """The content of a snapshot's file. Without logits, `State.load` can read it too."""
    tensors = dict(snapshot.state.tensors())
    if snapshot.logits is not None:
        tensors[LOGITS] = snapshot.logits
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    return safetensors.numpy.save(arrays, metadata={KIND: type(snapshot.state).__name__})


def _is_valid(record: SnapshotRecord) -> bool:
    """Whether the values could have been written here. A damaged page can contain any value."""
    has_types = all(type(getattr(record, field.name)).__name__ == field.type for field in FIELDS)
    return has_types and record.dtype == DTYPE and record.length > 0 and 0 <= record.last_used < MAX_USE_COUNT


def _delete_index(path: Path) -> None:
    """Delete an index and the files that SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
