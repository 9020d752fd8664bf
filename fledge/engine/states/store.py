"""The shelf: states that somebody keeps, each with its owner, and the conversations that stand at one of them.

    lock            held while the shelf is open
    shelf.sqlite    rows; owners only as SHA-256, since their names may be secrets
    states/         st_<22 characters>.state: state files (statefile.py), unsigned, as nobody else writes here

A file is complete and synced before its row is committed, and a row is gone before its file. So a state whose `put`
has returned survives a kill at any moment, and what a crash leaves over is swept away at the next opening. Nothing
goes by itself but for want of room.
States of other weights are kept, listed and counted like the rest, and handed out by a shelf of their own model only.

Unlike the cache's snapshots, what is here cannot be computed again: a damaged index is an error, not a new beginning.
All methods may be called from any thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from fledge.core.errors import FledgeError, StateError, UsageError
from fledge.core.files import atomic_path, describe_disk_error, exclusive, hash_name
from fledge.engine.states.eviction import giving_way
from fledge.engine.states.state_file import StateMetadata, dump, parse
from fledge.models.state import State

INDEX = "shelf.sqlite"
VERSION = 1
LONGEST_NAME = 200
OURS = re.compile(r"st_[A-Za-z0-9_-]{22}\.state|\.st_[A-Za-z0-9_-]{22}\.state\..*\.part")

TABLES = """
CREATE TABLE IF NOT EXISTS states (
    owner BLOB NOT NULL, id TEXT PRIMARY KEY, number INTEGER NOT NULL, name TEXT, size INTEGER NOT NULL,
    card TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_owner ON states (owner, number);
CREATE INDEX IF NOT EXISTS by_number ON states (number);
CREATE TABLE IF NOT EXISTS sessions (
    owner BLOB NOT NULL, name TEXT NOT NULL, id TEXT NOT NULL, PRIMARY KEY (owner, name)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_state ON sessions (id);
"""

FREE = "name IS NULL AND id NOT IN (SELECT id FROM sessions)"
"""What may go when there is no room: nobody has said that it should stay."""


@dataclass(frozen=True)
class StateEntry:
    """A kept state, without the state."""

    id: str
    name: str | None
    nbytes: int  # of its file
    card: StateMetadata


class SessionConflict(FledgeError):
    """A conversation stands at another state than was thought."""

    def __init__(self, session: str) -> None:
        super().__init__(f"conversation {session!r} has gone on meanwhile, or was forgotten")


class StoreTotals(NamedTuple):
    """What is kept: states, and bytes of their files."""

    states: int
    nbytes: int


class StateStore:
    """An open folder of states of one model.

    For want of room the states go that have no name and are no conversation's place, the oldest of whoever holds most
    (room.py). Where there are several owners, each is refused what would take more than their share of the limit.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: str, *, limit_bytes: int, share: float = 1.0) -> None:
        """identity: of the model's weights. limit_bytes: of all files together. share: of the limit, for each owner.

        Raises UsageError where another process has the folder open, FledgeError where it cannot be used.
        """
        self.folder, self._identity, self._limit, self._share = Path(folder), identity, limit_bytes, share
        self._lock = threading.RLock()
        with ExitStack() as stack:
            try:
                if not stack.enter_context(exclusive(self.folder)):
                    raise UsageError(f"{folder}: another process keeps its states there; give each a folder of its own")
                (self.folder / "states").mkdir(exist_ok=True)
                connection = sqlite3.connect(self.folder / INDEX, check_same_thread=False)
                self._index = stack.enter_context(contextlib.closing(connection))
                self._prepare()
                self._sweep()
            except OSError as error:
                raise FledgeError(f"{folder} cannot hold states: {error.strerror}") from None
            except sqlite3.Error as error:
                raise FledgeError(
                    f"{self.folder / INDEX} is damaged ({error}); bring back a copy of it, or move the folder away"
                ) from None
            self._open = stack.pop_all()

    def close(self) -> None:
        """Let go of the folder."""
        with self._lock:
            self._open.close()

    def totals(self) -> StoreTotals:
        """What all owners keep together."""
        with self._lock:
            return StoreTotals(
                int(self._index.execute("SELECT COUNT(*) FROM states").fetchone()[0]), self._held.total()
            )

    def put(self, owner: str, state: State, card: StateMetadata, name: str | None = None) -> str:
        """Keep a state; its id. Raises FledgeError where there is no room for it."""
        check_name(name)
        data, id, whose = dump(state, card), f"st_{secrets.token_urlsafe(16)}", hash_name(owner)
        with self._lock:
            self._make_room(whose, len(data))
            self._held[whose] += len(data)  # a promise, so that two threads do not take the same room
        try:
            with atomic_path(self._file(id)) as temporary:
                temporary.write_bytes(data)
            _sync(self.folder / "states")  # or a power cut could leave the row without its file
            text = json.dumps(asdict(card), ensure_ascii=False)
            with self._lock, self._index:
                number = self._index.execute("SELECT COALESCE(MAX(number), 0) + 1 FROM states").fetchone()[0]
                row = (whose, id, number, name, len(data), text)
                self._index.execute("INSERT INTO states VALUES (?, ?, ?, ?, ?, ?)", row)
        except (OSError, sqlite3.Error) as error:
            with self._lock:
                self._held[whose] -= len(data)
            self._file(id).unlink(missing_ok=True)
            reason = describe_disk_error(error, self.folder) if isinstance(error, OSError) else str(error)
            raise FledgeError(f"the state could not be kept: {reason}") from None
        return id

    def get(self, owner: str, id: str) -> tuple[State, StateMetadata]:
        """A kept state. Raises StateError where the owner has none of this id, it is of other weights, or damaged."""
        entry = self.describe(owner, id)
        entry.card.check(self._identity, "the model that runs here")
        try:
            state, _ = parse(self._file(id).read_bytes())
        except OSError as error:
            self.describe(owner, id)  # it may have been deleted just now, which is no damage
            raise StateError(f"the file of {id} cannot be read: {error.strerror}") from None
        except StateError as error:
            raise StateError(f"the file of {id} is damaged: {error}") from None
        return state, entry.card

    def describe(self, owner: str, id: str) -> StateEntry:
        """What is known of a kept state. Raises StateError where the owner has none of this id."""
        with self._lock:
            found = self._index.execute(
                "SELECT id, name, size, card FROM states WHERE id = ? AND owner = ?", (id, hash_name(owner))
            ).fetchone()
        if found is None:
            raise StateError(f"there is no state {id:.40}")
        return _entry(*found)

    def list(self, owner: str, most: int = 1000) -> list[StateEntry]:
        """The owner's states, newest first."""
        with self._lock:
            rows = self._index.execute(
                "SELECT id, name, size, card FROM states WHERE owner = ? ORDER BY number DESC LIMIT ?",
                (hash_name(owner), most),
            ).fetchall()
        return [_entry(*row) for row in rows]

    def delete(self, owner: str, id: str) -> None:
        """Forget a state, and the conversations that stand at it. Raises StateError where there is none of this id."""
        with self._lock:
            entry = self.describe(owner, id)
            with self._index:
                self._index.execute("DELETE FROM sessions WHERE id = ?", (id,))
                self._index.execute("DELETE FROM states WHERE id = ?", (id,))
            self._held[hash_name(owner)] -= entry.nbytes
            self._file(id).unlink(missing_ok=True)

    def head(self, owner: str, session: str) -> str | None:
        """The id of the state that a conversation stands at; None where there is no such conversation."""
        with self._lock:
            found = self._index.execute(
                "SELECT id FROM sessions WHERE owner = ? AND name = ?", (hash_name(owner), session)
            ).fetchone()
        return None if found is None else str(found[0])

    def set_head(self, owner: str, session: str, id: str, *, expected: str | None) -> None:
        """Let a conversation go from the state `expected` to another one; from None: let it begin.

        Raises Moved where it stands elsewhere by now, StateError where there is no state of this id.
        """
        check_name(session)
        with self._lock, self._index:
            self.describe(owner, id)
            if self.head(owner, session) != expected:
                raise SessionConflict(session)
            self._index.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (hash_name(owner), session, id))

    def _file(self, id: str) -> Path:
        return self.folder / "states" / f"{id}.state"

    def _prepare(self) -> None:
        # A commit waits for the disk: what was kept must be there after a power cut too.
        self._index.execute("PRAGMA journal_mode = WAL")
        self._index.execute("PRAGMA synchronous = FULL")
        (version,) = self._index.execute("PRAGMA user_version").fetchone()
        (found,) = self._index.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok" or version not in (0, VERSION):
            raise sqlite3.DatabaseError(found if found != "ok" else f"version {version}, not {VERSION}")
        with self._index:
            for statement in TABLES.split(";"):
                self._index.execute(statement)
            self._index.execute(f"PRAGMA user_version = {VERSION}")

    def _sweep(self) -> None:
        """Remove files of ours without a row; rows whose file is gone say so when they are asked for."""
        known = {f"{id}.state" for (id,) in self._index.execute("SELECT id FROM states")}
        with os.scandir(self.folder / "states") as entries:
            for entry in entries:
                if entry.name not in known and OURS.fullmatch(entry.name):
                    os.unlink(entry.path)
        self._held = Counter(dict(self._index.execute("SELECT owner, SUM(size) FROM states GROUP BY owner")))

    def _make_room(self, owner: bytes, size: int) -> None:
        """Remove what nobody named until `size` bytes of an owner fit."""
        victims = giving_way(owner, size, self._held, self._free, self._limit, self._share)
        with self._index:
            self._index.executemany("DELETE FROM states WHERE id = ?", [(id,) for _, id, _ in victims])
        for whose, id, length in victims:
            self._held[whose] -= length
            self._file(id).unlink(missing_ok=True)

    def _free(self, owner: bytes) -> Iterator[tuple[str, int]]:
        yield from self._index.execute(
            f"SELECT id, size FROM states WHERE owner = ? AND {FREE} ORDER BY number", (owner,)
        )


def check_name(name: str | None) -> None:
    """Raise UsageError for a name that cannot be stored: it came out of JSON, say, with half a character."""
    if name is not None and (len(name) > LONGEST_NAME or not name.isprintable()):
        raise UsageError(f"{name!r:.60} is no name for a state: at most {LONGEST_NAME} characters that can be printed")


def _sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where folders can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _entry(id: str, name: str | None, size: int, card: str) -> StateEntry:
    return StateEntry(id, name, size, StateMetadata(**json.loads(card)))
