"""A shelf that several servers share: signed state files in one folder that all of them see.

    <owner's hash>/states/st_<22 characters>.state      signed, so that only who has the secret can have put it there
    <owner's hash>/sessions/<name's hash>.json          which state a conversation stands at
    <owner's hash>/sessions/lock                        held while one of them is changed

As `Shelf`, but without an index: every file says what it is, is written whole or not at all, and
never changed. So any server answers for any other, and one that dies takes nothing along. Listing reads the head of
every file of an owner. The limit is looked at when a state is put, by each server for itself, so it can be exceeded by
as many states as are put at the same moment.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, StateError
from fledge.core.files import LOCK, atomic_path, describe_disk_error, hash_name, locked, read_json, write_json
from fledge.engine.states.eviction import giving_way
from fledge.engine.states.state_file import StateMetadata, dump, parse, peek
from fledge.engine.states.store import SessionConflict, StateEntry, StoreTotals, check_name
from fledge.models.state import State

File = tuple[int, int, Path]  # when it was put, in nanoseconds; bytes; where it is
Files = list[File]

ID = re.compile(r"st_[A-Za-z0-9_-]{22}")


class SharedStateStore:
    """An open folder of states, shared. For want of room states go as those of a `Shelf`."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: str,
        secret: bytes,
        *,
        limit_bytes: int,
        share: float = 1.0,
    ) -> None:
        """secret: what all servers sign with. share: of the limit, for each owner.

        Raises FledgeError where the folder cannot be used.
        """
        self.folder, self._identity, self._secret = Path(folder), identity, secret
        self._limit, self._share = limit_bytes, share
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FledgeError(f"{folder} cannot hold states: {error.strerror}") from None

    def close(self) -> None:
        """Nothing is held open."""

    def totals(self) -> StoreTotals:
        """What all owners keep together."""
        sizes = [size for _, size, _ in self._files()]
        return StoreTotals(len(sizes), sum(sizes))

    def put(self, owner: str, state: State, card: StateMetadata, name: str | None = None) -> str:
        """Keep a state; its id. Raises FledgeError where there is no room for it."""
        check_name(name)
        id = f"st_{secrets.token_urlsafe(16)}"
        data = dump(state, replace(card, title=name or ""), self._secret)
        self._make_room(_hash(owner), len(data))
        try:
            with atomic_path(self._file(owner, id)) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise FledgeError(f"the state could not be kept: {describe_disk_error(error, self.folder)}") from None
        return id

    def get(self, owner: str, id: str) -> tuple[State, StateMetadata]:
        """A kept state. Raises StateError where the owner has none of this id, it is of other weights, or damaged."""
        try:
            state, card = parse(self._file(owner, id).read_bytes(), self._secret)
        except OSError:
            raise StateError(f"there is no state {id:.40}") from None
        except StateError as error:
            raise StateError(f"the file of {id} is damaged: {error}") from None
        card.check(self._identity, "the model that runs here")
        return state, card

    def describe(self, owner: str, id: str) -> StateEntry:
        """What is known of a kept state. Raises StateError where the owner has none of this id."""
        path = self._file(owner, id)
        try:
            card, size = peek(path), path.stat().st_size
        except OSError:
            raise StateError(f"there is no state {id:.40}") from None
        return StateEntry(id, card.title or None, size, card)

    def list(self, owner: str, most: int = 1000) -> list[StateEntry]:
        """The owner's states, newest first."""
        found = list[StateEntry]()
        for _, _, path in sorted(self._files(_hash(owner)), reverse=True):
            with suppress(StateError):  # damaged, or deleted by another server meanwhile
                found.append(self.describe(owner, path.stem))
            if len(found) >= most:
                break
        return found

    def delete(self, owner: str, id: str) -> None:
        """Forget a state, and the conversations that stand at it. Raises StateError where there is none of this id."""
        self.describe(owner, id)
        with self._sessions(owner) as folder:
            for session in folder.glob("*.json"):
                if _session(session).get("id") == id:
                    session.unlink(missing_ok=True)
        self._file(owner, id).unlink(missing_ok=True)

    def head(self, owner: str, session: str) -> str | None:
        """The id of the state that a conversation stands at; None where there is no such conversation."""
        id = _session(self._place(owner, session)).get("id")
        return id if isinstance(id, str) and ID.fullmatch(id) else None

    def set_head(self, owner: str, session: str, id: str, *, expected: str | None) -> None:
        """Let a conversation go from the state `expected` to another one; from None: let it begin.

        Raises Moved where it stands elsewhere by now, StateError where there is no state of this id.
        """
        check_name(session)
        self.describe(owner, id)
        with self._sessions(owner):
            if self.head(owner, session) != expected:
                raise SessionConflict(session)
            write_json(self._place(owner, session), {"name": session, "id": id})

    @contextmanager
    def _sessions(self, owner: str) -> Iterator[Path]:
        """The folder of an owner's conversations, which no other server changes during the block."""
        folder = self.folder / _hash(owner) / "sessions"
        try:
            with locked(folder / LOCK):
                yield folder
        except OSError as error:
            raise FledgeError(
                f"the conversation could not be kept: {describe_disk_error(error, self.folder)}"
            ) from None

    def _file(self, owner: str, id: str) -> Path:
        """Where a state is. An id comes from outside, so it must not lead anywhere else."""
        if not ID.fullmatch(id):
            raise StateError(f"there is no state {id:.40}")
        return self.folder / _hash(owner) / "states" / f"{id}.state"

    def _place(self, owner: str, session: str) -> Path:
        return self.folder / _hash(owner) / "sessions" / f"{_hash(session)}.json"

    def _files(self, owner: str = "*") -> Iterator[File]:
        """When each state was put, its bytes and its file."""
        for path in self.folder.glob(f"{owner}/states/st_*.state"):
            with suppress(OSError):  # another server has deleted it meanwhile
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    def _make_room(self, owner: str, size: int) -> None:
        """Remove what nobody named until `size` bytes fit; here and below an owner is the name of a folder."""
        found: defaultdict[str, Files] = defaultdict(list)
        for entry in self._files():
            found[entry[2].parent.parent.name].append(entry)
        held = {whose: sum(length for _, length, _ in entries) for whose, entries in found.items()}
        free = partial(self._free, found)
        for _, path, _ in giving_way(owner, size, held, free, self._limit, self._share):
            path.unlink(missing_ok=True)

    def _free(self, found: Mapping[str, Files], owner: str) -> Iterator[tuple[Path, int]]:
        standing = {_session(place).get("id") for place in (self.folder / owner / "sessions").glob("*.json")}
        for _, length, path in sorted(found.get(owner, ())):
            if path.stem not in standing and not _named(path):
                yield path, length


def _named(path: Path) -> bool:
    try:
        return bool(peek(path).title)
    except (OSError, StateError):
        return False


def _session(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _hash(text: str) -> str:
    return hash_name(text).hex()[:32]
