"""Snapshots in a folder: one file each and a SQLite index, sound after a kill at any moment.

A file is complete and synced before its row is committed, and a row is gone before its file, so a kill leaves at most
a file without a row. The next opening removes it, and any row whose file is gone, as a full disk may leave one. Each
row has a checksum of its file. A damaged index is set aside and begun anew: what it led to can be computed again. Who
has the store open has the folder alone.

    lock           held while the store is open
    index.sqlite   rows; spaces and token ids only as SHA-256, since both may be secrets
    states/        <random name>.safetensors: the tensors of a state, float32 as they were, and perhaps `logits`

Not here: which snapshots to keep, and threads (snapshots.py). `read` alone may be called beside another method.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import secrets
import sqlite3
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fledge.core.errors import UsageError
from fledge.core.files import atomic_path
from fledge.core.locks import try_lock_folder
from fledge.models.state import KINDS, State

log = logging.getLogger("fledge")

INDEX = "index.sqlite"
VERSION = 1  # of the table below; an index with another one is not read
DTYPE = "float32"
LOGITS = "logits"
MAX_USE_COUNT = 1 << 62  # uses; a column holds no more than 63 bits
OWN_FILES = re.compile(
    r"[0-9a-f]{32}\.safetensors|\.[0-9a-f]{32}\.safetensors\..*\.part"
)  # all that a sweep may remove

TABLE = """
CREATE TABLE IF NOT EXISTS snapshots (
    identity TEXT, space BLOB, ids BLOB, anchor BLOB, length INTEGER, file TEXT, size INTEGER, checksum INTEGER,
    kind TEXT, dtype TEXT, logits INTEGER, used INTEGER, PRIMARY KEY (identity, space, ids)
) WITHOUT ROWID
"""


class Snapshot(NamedTuple):
    """A state of one sequence, and the scores of the token after it where they are known."""

    state: State
    logits: Tensor | None  # (V,) float32

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.state.nbytes + (0 if self.logits is None else self.logits.numel() * self.logits.element_size())


@dataclass
class SnapshotRecord:
    """What the index says of a snapshot: the columns of the table, in their order."""

    identity: str  # of the model
    space: bytes  # SHA-256, as the next two
    ids: bytes  # of all tokens read
    anchor: bytes  # of the tokens up to the last whole block, by which a longest prefix is found
    length: int  # tokens read
    file: str = ""  # empty until there is one
    size: int = 0  # bytes of the file
    checksum: int = 0  # its CRC-32
    kind: str = ""  # the class of the state
    dtype: str = DTYPE
    logits: int = 0  # whether it has them
    used: int = 0  # a count that rises with each use, so that a clock that is set back does no harm

    @property
    def key(self) -> tuple[str, bytes, bytes]:
        """What no two rows have in common."""
        return self.identity, self.space, self.ids


FIELDS = dataclasses.fields(SnapshotRecord)
KEY = "identity = ? AND space = ? AND ids = ?"


class SnapshotStore:
    """An open folder. `rows` is what it held at opening, the least recently used first."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError where another process has it open, OSError or sqlite3.Error where it cannot be used."""
        self._states = folder / "states"
        with ExitStack() as stack:
            if not stack.enter_context(try_lock_folder(folder)):
                raise UsageError(f"{folder}: another process keeps its snapshots there; give each a folder of its own")
            self._states.mkdir(exist_ok=True)
            self._index, rows = _open_index(folder / INDEX)
            stack.callback(self._index.close)
            self.records = self._sweep(rows)
            self._open = stack.pop_all()

    def close(self) -> None:
        """Let go of the folder."""
        self._open.close()

    def write(self, row: SnapshotRecord, data: bytes) -> SnapshotRecord:
        """Keep `data`, and `row` for it in place of the one with the same key. Returns the row as it was completed."""
        done = dataclasses.replace(
            row, file=f"{secrets.token_hex(16)}.safetensors", size=len(data), checksum=zlib.crc32(data)
        )
        with atomic_path(self._states / done.file) as temporary:
            temporary.write_bytes(data)
        marks = ", ".join("?" * len(FIELDS))
        try:
            with self._index:
                self._index.execute(f"INSERT OR REPLACE INTO snapshots VALUES ({marks})", dataclasses.astuple(done))
        except BaseException:
            (self._states / done.file).unlink(missing_ok=True)
            raise
        if row.file:
            (self._states / row.file).unlink(missing_ok=True)
        return done

    def read(self, row: SnapshotRecord) -> Snapshot | None:
        """The snapshot of a row, on the CPU; None where its file is gone or damaged."""
        try:
            data = (self._states / row.file).read_bytes()
            if len(data) != row.size or zlib.crc32(data) != row.checksum:
                return None
            tensors = safetensors.torch.load(data)
            logits = tensors.pop(LOGITS) if row.logits else None
            return Snapshot(KINDS[row.kind](**tensors), logits)
        except (OSError, SafetensorError, KeyError, TypeError):
            return None

    def remove(self, rows: Iterable[SnapshotRecord]) -> None:
        """Forget rows, then their files; the files also where a full disk takes no change of the index."""
        rows = list(rows)
        try:
            self._forget(rows)
        finally:  # a row that has lost its file is a miss, and goes at the next opening
            for row in rows:
                if row.file:
                    (self._states / row.file).unlink(missing_ok=True)

    def touch(self, rows: Iterable[SnapshotRecord]) -> None:
        """Write down when rows were last used."""
        with self._index:
            self._index.executemany(
                f"UPDATE snapshots SET used = ? WHERE {KEY}", [(row.used, *row.key) for row in rows]
            )

    def _forget(self, rows: Iterable[SnapshotRecord]) -> None:
        with self._index:
            self._index.executemany(f"DELETE FROM snapshots WHERE {KEY}", [row.key for row in rows])

    def _sweep(self, rows: list[SnapshotRecord]) -> list[SnapshotRecord]:
        """The rows that have a file of their size; other rows, and files of ours without a row, are removed."""
        with os.scandir(self._states) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if OWN_FILES.fullmatch(entry.name)}
        sound = [row for row in rows if _sound(row) and sizes.get(row.file) == row.size]
        known = {row.file for row in sound}
        self._forget(row for row in rows if row.file not in known)
        for name in sizes.keys() - known:
            (self._states / name).unlink(missing_ok=True)
        return sound


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """The content of a snapshot's file. Without logits, `State.load` can read it too."""
    return snapshot.state.encode(tensors=None if snapshot.logits is None else {LOGITS: snapshot.logits})


def _sound(row: SnapshotRecord) -> bool:
    """Whether the values, which a damaged page can turn into anything, are such as were written."""
    typed = all(type(getattr(row, field.name)).__name__ == field.type for field in FIELDS)
    return typed and row.dtype == DTYPE and row.length > 0 and 0 <= row.used < MAX_USE_COUNT


def _open_index(path: Path) -> tuple[sqlite3.Connection, list[SnapshotRecord]]:
    """The index and its rows; where it is damaged or of another version it is begun anew."""
    try:
        return _connected(path)
    except sqlite3.Error as error:
        # A full or failing disk raises much the same errors as a damaged file, but lets no new index be made either.
        fresh, aside = path.with_suffix(".new"), path.with_suffix(".damaged")
        _discard(fresh)
        _connected(fresh)[0].close()
        os.replace(path, aside)
        _discard(path)
        os.replace(fresh, path)
        log.warning("%s cannot be read (%s); it is now %s, and the snapshots begin anew", path, error, aside.name)
        return _connected(path)


def _discard(path: Path) -> None:
    """Remove an index with what SQLite keeps beside it."""
    for rest in ("", "-wal", "-shm"):
        path.with_name(path.name + rest).unlink(missing_ok=True)


def _connected(path: Path) -> tuple[sqlite3.Connection, list[SnapshotRecord]]:
    """An index that has passed its check, and its rows, the least recently used first."""
    with ExitStack() as stack:
        # Made by one thread and used by another, never by both at a time.
        index = stack.enter_context(contextlib.closing(sqlite3.connect(path, check_same_thread=False)))
        index.text_factory = lambda data: data.decode(errors="replace")
        # With a write-ahead log a commit waits for no disk, and a power cut costs the last rows, not the index.
        index.execute("PRAGMA journal_mode = WAL")
        index.execute("PRAGMA synchronous = NORMAL")
        (found,) = index.execute("PRAGMA quick_check(1)").fetchone()
        (version,) = index.execute("PRAGMA user_version").fetchone()
        if found != "ok" or version not in (0, VERSION):
            raise sqlite3.DatabaseError(found if found != "ok" else f"version {version}, not {VERSION}")
        with index:
            index.execute(TABLE)
            index.execute(f"PRAGMA user_version = {VERSION}")
        columns = ", ".join(field.name for field in FIELDS)
        rows = [SnapshotRecord(*values) for values in index.execute(f"SELECT {columns} FROM snapshots ORDER BY used")]
        stack.pop_all()
        return index, rows
