"""`StateStore`: saved states by owner, and the conversations that refer to them, in a folder with an SQLite index.

    lock            held while the store is open
    shelf.sqlite    the index; owners only as SHA-256, since their names may be secrets
    states/         st_<22 characters>.state: state files, unsigned, as only this process writes here

A file is complete and synced before its row is committed, and a row is deleted before its file. So a state survives a
crash at any moment after `put` returns, and files left over by a crash are deleted when the store is opened again.
States are evicted only if the store is full. States of other weights are stored, listed and counted like the others,
but only a store opened for their model returns them.

Unlike the snapshots of the prefix cache, saved states cannot be recomputed: a damaged index is an error, not replaced.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from fledge.core.errors import FledgeError, StateError, UsageError
from fledge.core.files import describe_disk_error, hash_name
from fledge.core.sqlite_store import IndexSchema, SqliteStore
from fledge.engine.states.eviction import select_evictions
from fledge.engine.states.state_file import LoadedState, StateMetadata, decode_state, encode_state
from fledge.models.state import State

MAX_NAME_LENGTH = 200

TABLES = (
    "CREATE TABLE IF NOT EXISTS states (owner BLOB NOT NULL, id TEXT PRIMARY KEY, number INTEGER NOT NULL, name TEXT, "
    "size INTEGER NOT NULL, card TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS by_owner ON states (owner, number)",
    "CREATE INDEX IF NOT EXISTS by_number ON states (number)",
    "CREATE TABLE IF NOT EXISTS sessions (owner BLOB NOT NULL, name TEXT NOT NULL, id TEXT NOT NULL, "
    "PRIMARY KEY (owner, name)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS by_state ON sessions (id)",
)

EVICTABLE = "name IS NULL AND id NOT IN (SELECT id FROM sessions)"
"""States without a name and without a conversation may be evicted."""


@dataclass(frozen=True)
class StateEntry:
    """What the store knows about a state, without its tensors."""

    id: str
    name: str | None
    nbytes: int  # of its file
    metadata: StateMetadata


class SessionConflict(FledgeError):
    """The current state of a conversation is not the expected one."""

    def __init__(self, session: str) -> None:
        super().__init__(f"conversation {session!r} was changed by another request, or deleted")


class StoreTotals(NamedTuple):
    """The number of states, and the bytes of their files."""

    states: int
    nbytes: int


class StateStore(SqliteStore):
    """An open folder of states of one model. All methods may be called from any thread.

    If the store is full, states are evicted that have no name and are not the current state of a conversation, the
    oldest of the owner with the most bytes first (eviction.py). Each owner may use at most a share of the limit.
    """

    INDEX = "shelf.sqlite"
    SCHEMA = IndexSchema(TABLES, version=1, is_durable=True)  # saved states must survive a power failure
    OWN_FILES = re.compile(r"st_[A-Za-z0-9_-]{22}\.state|\.st_[A-Za-z0-9_-]{22}\.state\..*\.part")
    CONTENT = "states"

    def __init__(
        self, folder: str | os.PathLike[str], identity: str, *, limit_bytes: int, owner_share: float = 1.0
    ) -> None:
        """identity: of the model's weights. limit_bytes: of all files. owner_share: of the limit, for each owner.

        Raises UsageError if another process has the folder open, FledgeError if the folder cannot be used.
        """
        self._identity, self._limit, self._owner_share = identity, limit_bytes, owner_share
        self._lock = threading.RLock()
        try:
            super().__init__(Path(folder))
        except OSError as error:
            raise FledgeError(f"{folder} cannot hold states: {error.strerror}") from None
        except sqlite3.Error as error:
            raise FledgeError(
                f"{self.folder / self.INDEX} is damaged ({error}); restore a backup of it, or move the folder away"
            ) from None

    def close(self) -> None:
        """Close the index and release the folder."""
        with self._lock:
            super().close()

    def totals(self) -> StoreTotals:
        """Number and bytes of the states of all owners."""
        with self._lock:
            return StoreTotals(
                int(self._index.execute("SELECT COUNT(*) FROM states").fetchone()[0]), self._used.total()
            )

    def put(self, owner: str, state: State, metadata: StateMetadata, name: str | None = None) -> str:
        """Store a state and return its id. Raises FledgeError if the store is full and not enough can be evicted."""
        check_name(name)
        data, id, owner_hash = encode_state(state, metadata), f"st_{secrets.token_urlsafe(16)}", hash_name(owner)
        with self._lock:
            self._evict_for(owner_hash, len(data))
            self._used[owner_hash] += len(data)  # reserved, so that two threads do not use the same space
        try:
            self._write_file(_file_name(id), data)
            _sync(self._files)  # otherwise a power failure could leave the row without its file
            text = json.dumps(asdict(metadata), ensure_ascii=False)
            with self._lock, self._index:
                number = self._index.execute("SELECT COALESCE(MAX(number), 0) + 1 FROM states").fetchone()[0]
                row = (owner_hash, id, number, name, len(data), text)
                self._index.execute("INSERT INTO states VALUES (?, ?, ?, ?, ?, ?)", row)
        except (OSError, sqlite3.Error) as error:
            with self._lock:
                self._used[owner_hash] -= len(data)
            self._delete_files([_file_name(id)])
            reason = describe_disk_error(error, self.folder) if isinstance(error, OSError) else str(error)
            raise FledgeError(f"the state could not be saved: {reason}") from None
        return id

    def get(self, owner: str, id: str) -> LoadedState:
        """A state and its metadata.

        Raises StateError if the owner has no state of this id, if other weights made it, or if its file is damaged.
        """
        entry = self.describe(owner, id)
        entry.metadata.check(self._identity, "the loaded model")
        try:
            state, _ = decode_state((self._files / _file_name(id)).read_bytes())
        except OSError as error:
            self.describe(owner, id)  # raises if the state has just been deleted, which is not damage
            raise StateError(f"the file of {id} cannot be read: {error.strerror}") from None
        except StateError as error:
            raise StateError(f"the file of {id} is damaged: {error}") from None
        return LoadedState(state, entry.metadata)

    def describe(self, owner: str, id: str) -> StateEntry:
        """The entry of a state, without its tensors. Raises StateError if the owner has no state of this id."""
        with self._lock:
            row = self._index.execute(
                "SELECT id, name, size, card FROM states WHERE id = ? AND owner = ?", (id, hash_name(owner))
            ).fetchone()
        if row is None:
            raise StateError(f"there is no state {id:.40}")
        return _entry(*row)

    def list(self, owner: str, limit: int = 1000) -> list[StateEntry]:
        """The entries of the owner's states, newest first, at most `limit`."""
        with self._lock:
            rows = self._index.execute(
                "SELECT id, name, size, card FROM states WHERE owner = ? ORDER BY number DESC LIMIT ?",
                (hash_name(owner), limit),
            ).fetchall()
        return [_entry(*row) for row in rows]

    def delete(self, owner: str, id: str) -> None:
        """Delete a state, and the conversations whose current state it is.

        Raises StateError if the owner has no state of this id.
        """
        with self._lock:
            entry = self.describe(owner, id)
            with self._index:
                self._index.execute("DELETE FROM sessions WHERE id = ?", (id,))
                self._index.execute("DELETE FROM states WHERE id = ?", (id,))
            self._used[hash_name(owner)] -= entry.nbytes
            self._delete_files([_file_name(id)])

    def current_state(self, owner: str, session: str) -> str | None:
        """The id of the current state of a conversation; None if there is no such conversation."""
        with self._lock:
            row = self._index.execute(
                "SELECT id FROM sessions WHERE owner = ? AND name = ?", (hash_name(owner), session)
            ).fetchone()
        return None if row is None else str(row[0])

    def compare_and_set(self, owner: str, session: str, id: str, *, expected: str | None) -> None:
        """Change the current state of a conversation from `expected` to `id`; expected=None creates the conversation.

        Raises SessionConflict if the current state is not `expected`, StateError if the owner has no state of this id.
        """
        check_name(session)
        with self._lock, self._index:
            self.describe(owner, id)
            if self.current_state(owner, session) != expected:
                raise SessionConflict(session)
            self._index.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (hash_name(owner), session, id))

    def _load(self) -> None:
        """Delete files without a row; `get` reports rows whose file is missing. Then count the bytes of each owner."""
        indexed = {_file_name(id) for (id,) in self._index.execute("SELECT id FROM states")}
        self._delete_files(self._own_files().keys() - indexed)
        self._used = Counter(dict(self._index.execute("SELECT owner, SUM(size) FROM states GROUP BY owner")))

    def _evict_for(self, owner: bytes, size: int) -> None:
        """Evict states until `size` more bytes of an owner fit."""
        evictions = select_evictions(owner, size, self._used, self._evictable, self._limit, self._owner_share)
        with self._index:
            self._index.executemany("DELETE FROM states WHERE id = ?", [(id,) for _, id, _ in evictions])
        for evicted_owner, _, length in evictions:
            self._used[evicted_owner] -= length
        self._delete_files(_file_name(id) for _, id, _ in evictions)

    def _evictable(self, owner: bytes) -> Iterator[tuple[str, int]]:
        yield from self._index.execute(
            f"SELECT id, size FROM states WHERE owner = ? AND {EVICTABLE} ORDER BY number", (owner,)
        )


def _file_name(id: str) -> str:
    return f"{id}.state"


def check_name(name: str | None) -> None:
    """Raise UsageError for a name that is too long or has characters that cannot be printed, such as a surrogate."""
    if name is not None and (len(name) > MAX_NAME_LENGTH or not name.isprintable()):
        raise UsageError(
            f"{name!r:.60} is not a valid name for a state: it must have at most {MAX_NAME_LENGTH} printable characters"
        )


def _sync(folder: Path) -> None:
    """Wait until the file names in a folder are on the disk, on systems that can open folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _entry(id: str, name: str | None, size: int, metadata: str) -> StateEntry:
    return StateEntry(id, name, size, StateMetadata(**json.loads(metadata)))
