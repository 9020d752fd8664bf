"""`SharedStateStore`: a state store for several servers, made of signed state files in a shared folder.

    <owner's hash>/states/st_<22 characters>.state      signed, so that only a server with the secret can write it
    <owner's hash>/sessions/<name's hash>.json          the current state of a conversation
    <owner's hash>/sessions/lock                        held while a conversation is changed

Same methods as `StateStore`, but without an index: each file has its own metadata, is written atomically and never
changes. So any server can answer any request, and a crash of one server loses nothing. Listing reads the header of each
file of an owner. Each server checks the limit when it stores a state, so states stored at the same moment can exceed
it.
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
from fledge.core.files import atomic_path, describe_disk_error, hash_name, read_json, write_json
from fledge.core.locks import LOCK_NAME, lock_file
from fledge.engine.states.eviction import select_evictions
from fledge.engine.states.state_file import LoadedState, StateMetadata, decode_state, encode_state, read_metadata
from fledge.engine.states.store import SessionConflict, StateEntry, StoreTotals, check_name
from fledge.models.state import State

StoredFile = tuple[int, int, Path]  # time it was stored, in nanoseconds; bytes; path
StoredFiles = list[StoredFile]

ID = re.compile(r"st_[A-Za-z0-9_-]{22}")


class SharedStateStore:
    """An open folder of states that several servers share. Eviction is as in `StateStore`."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: str,
        secret: bytes,
        *,
        limit_bytes: int,
        owner_share: float = 1.0,
    ) -> None:
        """secret: the signing key of all servers. owner_share: of the limit, for each owner.

        Raises FledgeError if the folder cannot be used.
        """
        self.folder, self._identity, self._secret = Path(folder), identity, secret
        self._limit, self._owner_share = limit_bytes, owner_share
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FledgeError(f"{folder} cannot hold states: {error.strerror}") from None

    def close(self) -> None:
        """Nothing to release: the store holds no open files."""

    def totals(self) -> StoreTotals:
        """Number and bytes of the states of all owners."""
        sizes = [size for _, size, _ in self._files()]
        return StoreTotals(len(sizes), sum(sizes))

    def put(self, owner: str, state: State, metadata: StateMetadata, name: str | None = None) -> str:
        """Store a state and return its id. Raises FledgeError if the store is full and not enough can be evicted."""
        check_name(name)
        id = f"st_{secrets.token_urlsafe(16)}"
        data = encode_state(state, replace(metadata, title=name or ""), self._secret)
        self._evict_for(_hash(owner), len(data))
        try:
            with atomic_path(self._file(owner, id)) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise FledgeError(f"the state could not be saved: {describe_disk_error(error, self.folder)}") from None
        return id

    def get(self, owner: str, id: str) -> LoadedState:
        """A state and its metadata.

        Raises StateError if the owner has no state of this id, if other weights made it, or if its file is damaged.
        """
        try:
            state, metadata = decode_state(self._file(owner, id).read_bytes(), self._secret)
        except OSError:
            raise StateError(f"there is no state {id:.40}") from None
        except StateError as error:
            raise StateError(f"the file of {id} is damaged: {error}") from None
        metadata.check(self._identity, "the loaded model")
        return LoadedState(state, metadata)

    def describe(self, owner: str, id: str) -> StateEntry:
        """The entry of a state, without its tensors. Raises StateError if the owner has no state of this id."""
        path = self._file(owner, id)
        try:
            metadata, size = read_metadata(path), path.stat().st_size
        except OSError:
            raise StateError(f"there is no state {id:.40}") from None
        return StateEntry(id, metadata.title or None, size, metadata)

    def list(self, owner: str, limit: int = 1000) -> list[StateEntry]:
        """The entries of the owner's states, newest first, at most `limit`."""
        entries = list[StateEntry]()
        for _, _, path in sorted(self._files(_hash(owner)), reverse=True):
            with suppress(StateError):  # damaged, or just deleted by another server
                entries.append(self.describe(owner, path.stem))
            if len(entries) >= limit:
                break
        return entries

    def delete(self, owner: str, id: str) -> None:
        """Delete a state, and the conversations whose current state it is.

        Raises StateError if the owner has no state of this id.
        """
        self.describe(owner, id)
        with self._sessions(owner) as folder:
            for session in folder.glob("*.json"):
                if _read_session(session).get("id") == id:
                    session.unlink(missing_ok=True)
        self._file(owner, id).unlink(missing_ok=True)

    def current_state(self, owner: str, session: str) -> str | None:
        """The id of the current state of a conversation; None if there is no such conversation."""
        id = _read_session(self._session_file(owner, session)).get("id")
        return id if isinstance(id, str) and ID.fullmatch(id) else None

    def compare_and_set(self, owner: str, session: str, id: str, *, expected: str | None) -> None:
        """Change the current state of a conversation from `expected` to `id`; expected=None creates the conversation.

        Raises SessionConflict if the current state is not `expected`, StateError if the owner has no state of this id.
        """
        check_name(session)
        self.describe(owner, id)
        with self._sessions(owner):
            if self.current_state(owner, session) != expected:
                raise SessionConflict(session)
            write_json(self._session_file(owner, session), {"name": session, "id": id})

    @contextmanager
    def _sessions(self, owner: str) -> Iterator[Path]:
        """The folder of an owner's conversations, locked against other servers during the block."""
        folder = self.folder / _hash(owner) / "sessions"
        try:
            with lock_file(folder / LOCK_NAME):
                yield folder
        except OSError as error:
            raise FledgeError(
                f"the conversation could not be saved: {describe_disk_error(error, self.folder)}"
            ) from None

    def _file(self, owner: str, id: str) -> Path:
        """The path of a state. Ids come from requests, so any other form of id is rejected."""
        if not ID.fullmatch(id):
            raise StateError(f"there is no state {id:.40}")
        return self.folder / _hash(owner) / "states" / f"{id}.state"

    def _session_file(self, owner: str, session: str) -> Path:
        return self.folder / _hash(owner) / "sessions" / f"{_hash(session)}.json"

    def _files(self, owner: str = "*") -> Iterator[StoredFile]:
        """The state files of an owner, or of all owners."""
        for path in self.folder.glob(f"{owner}/states/st_*.state"):
            with suppress(OSError):  # another server has just deleted it
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    def _evict_for(self, owner: str, size: int) -> None:
        """Evict states until `size` more bytes fit. Here and in `_evictable`, an owner is the name of a folder."""
        files: defaultdict[str, StoredFiles] = defaultdict(list)
        for file in self._files():
            files[file[2].parent.parent.name].append(file)
        used = {name: sum(length for _, length, _ in entries) for name, entries in files.items()}
        evictable = partial(self._evictable, files)
        for _, path, _ in select_evictions(owner, size, used, evictable, self._limit, self._owner_share):
            path.unlink(missing_ok=True)

    def _evictable(self, files: Mapping[str, StoredFiles], owner: str) -> Iterator[tuple[Path, int]]:
        current = {_read_session(path).get("id") for path in (self.folder / owner / "sessions").glob("*.json")}
        for _, length, path in sorted(files.get(owner, ())):
            if path.stem not in current and not _has_name(path):
                yield path, length


def _has_name(path: Path) -> bool:
    try:
        return bool(read_metadata(path).title)
    except (OSError, StateError):
        return False


def _read_session(path: Path) -> dict[str, Any]:
    try:
        session = read_json(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return session if isinstance(session, dict) else {}


def _hash(text: str) -> str:
    return hash_name(text).hex()[:32]
