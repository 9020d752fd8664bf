"""A shelf that several servers share: signed state files in one folder that all of them see.

    <owner's hash>/states/st_<22 characters>.state      signed, so that only who has the secret can have put it there
    <owner's hash>/sessions/<name's hash>.json          which state a conversation stands at

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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, StateError
from fledge.core.files import atomic_path, disk_trouble, name_hash, read_json, write_json
from fledge.engine.shelf import Entry, Totals, check_name
from fledge.engine.statefile import StateCard, dump, parse, peek
from fledge.models.state import State

ID = re.compile(r"st_[A-Za-z0-9_-]{22}")


class Commons:
    """An open folder of states, shared."""

    def __init__(self, folder: str | os.PathLike[str], identity: str, secret: bytes, *, limit_bytes: int) -> None:
        """secret: what all servers sign with. Raises FledgeError where the folder cannot be used."""
        self.folder, self._identity, self._secret, self._limit = Path(folder), identity, secret, limit_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FledgeError(f"{folder} cannot hold states: {error.strerror}") from None

    def close(self) -> None:
        """Nothing is held open."""

    def totals(self) -> Totals:
        """What all owners keep together."""
        sizes = [size for _, size, _ in self._files()]
        return Totals(len(sizes), sum(sizes))

    def put(self, owner: str, state: State, card: StateCard, name: str | None = None) -> str:
        """Keep a state; its id. Raises FledgeError where there is no room for it."""
        check_name(name)
        id = f"st_{secrets.token_urlsafe(16)}"
        data = dump(state, replace(card, title=name or ""), self._secret)
        self._make_room(len(data))
        try:
            with atomic_path(self._file(owner, id)) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise FledgeError(f"the state could not be kept: {disk_trouble(error, self.folder)}") from None
        return id

    def get(self, owner: str, id: str) -> tuple[State, StateCard]:
        """A kept state. Raises StateError where the owner has none of this id, it is of other weights, or damaged."""
        try:
            state, card = parse(self._file(owner, id).read_bytes(), self._secret)
        except OSError:
            raise StateError(f"there is no state {id:.40}") from None
        except StateError as error:
            raise StateError(f"the file of {id} is damaged: {error}") from None
        card.check(self._identity, "the model that runs here")
        return state, card

    def describe(self, owner: str, id: str) -> Entry:
        """What is known of a kept state. Raises StateError where the owner has none of this id."""
        path = self._file(owner, id)
        try:
            card, size = peek(path), path.stat().st_size
        except OSError:
            raise StateError(f"there is no state {id:.40}") from None
        return Entry(id, card.title or None, size, card)

    def list(self, owner: str, most: int = 1000) -> list[Entry]:
        """The owner's states, newest first."""
        found = list[Entry]()
        for _, _, path in sorted(self._files(_hash(owner)), reverse=True):
            with suppress(StateError):  # damaged, or deleted by another server meanwhile
                found.append(self.describe(owner, path.stem))
            if len(found) >= most:
                break
        return found

    def delete(self, owner: str, id: str) -> None:
        """Forget a state, and the conversations that stand at it. Raises StateError where there is none of this id."""
        self.describe(owner, id)
        for session in (self.folder / _hash(owner) / "sessions").glob("*.json"):
            if _session(session).get("id") == id:
                session.unlink(missing_ok=True)
        self._file(owner, id).unlink(missing_ok=True)

    def head(self, owner: str, session: str) -> str | None:
        """The id of the state that a conversation stands at; None where there is no such conversation."""
        id = _session(self._place(owner, session)).get("id")
        return id if isinstance(id, str) and ID.fullmatch(id) else None

    def set_head(self, owner: str, session: str, id: str) -> None:
        """Let a conversation stand at a state; it begins by this. Raises StateError where there is none of this id."""
        check_name(session)
        self.describe(owner, id)
        write_json(self._place(owner, session), {"name": session, "id": id})

    def _file(self, owner: str, id: str) -> Path:
        """Where a state is. An id comes from outside, so it must not lead anywhere else."""
        if not ID.fullmatch(id):
            raise StateError(f"there is no state {id:.40}")
        return self.folder / _hash(owner) / "states" / f"{id}.state"

    def _place(self, owner: str, session: str) -> Path:
        return self.folder / _hash(owner) / "sessions" / f"{_hash(session)}.json"

    def _files(self, owner: str = "*") -> Iterator[tuple[int, int, Path]]:
        """When each state was put, its bytes and its file."""
        for path in self.folder.glob(f"{owner}/states/st_*.state"):
            with suppress(OSError):  # another server has deleted it meanwhile
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    def _make_room(self, size: int) -> None:
        """Remove the oldest states that nobody named until `size` bytes fit."""
        found = list(self._files())
        excess = sum(length for _, length, _ in found) + size - self._limit
        if excess <= 0:
            return
        standing = {_session(place).get("id") for place in self.folder.glob("*/sessions/*.json")}
        victims = []
        for _, length, path in sorted(found):
            if excess <= 0:
                break
            if path.stem not in standing and not _named(path):
                victims.append(path)
                excess -= length
        if excess > 0:  # and then nothing has gone in vain
            raise FledgeError(
                f"the shelf is full: its {self._limit / 1e6:.1f} MB are taken by states that have a name or a "
                "conversation; delete some"
            )
        for path in victims:
            path.unlink(missing_ok=True)


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
    return name_hash(text).hex()[:32]
