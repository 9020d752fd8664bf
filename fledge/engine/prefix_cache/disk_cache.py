"""Snapshots on the disk, for a cache that its engine never waits for.

All that is known of the snapshots is in memory; one thread does every write, in the order it was asked to. Until a
snapshot has been written it is found where it waits. More than `queue` bytes do not wait: what comes then is dropped.
The least recently used give way when the files exceed `limit` bytes.

The longest stored prefix of a prompt is found by hashes, so that neither the tree of a former process nor the ids have
to be kept: each row has the SHA-256 of its tokens and of those up to the last whole block of BLOCK tokens before. One
pass over the prompt meets the blocks that lead anywhere; from the last of them on, the lengths that occur there are
tried. That is a fifth of a millisecond for 32,768 tokens and grows neither with the rows nor with their lengths.

Nothing here raises once it is made: a disk that fails is a miss, and is said once. Not here: the files
(snapshot_store.py) and what is worth keeping (cache.py).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fledge.core.files import hash_name
from fledge.engine.prefix_cache.disk_store import Snapshot, SnapshotRecord, SnapshotStore, encode_snapshot
from fledge.engine.prefix_cache.radix_tree import TOKEN_BYTES

log = logging.getLogger("fledge")

BLOCK_TOKENS = 128  # tokens
QUEUE_BYTES = 64 << 20

Key = tuple[str, bytes, bytes]
Job = Callable[[], None]


class StoredSnapshot(NamedTuple):
    """A snapshot and the tokens it has read."""

    length: int
    snapshot: Snapshot


class DiskCache:
    """The snapshots of one model in a folder, called from one thread. Paths are token ids as `radix.packed` has them.

    Snapshots of other models in the same folder are never read, but count and age like these.
    """

    def __init__(
        self, folder: str | os.PathLike[str], identity: str, *, max_bytes: int, queue_bytes: int = QUEUE_BYTES
    ) -> None:
        """identity: of the model, its weights' hash say; states of another are of no use to it. limit: bytes of files.

        Raises UsageError where another process has the folder. One that cannot be used is an empty one, with a warning.
        """
        self.folder = Path(folder)
        self._identity, self._max_bytes, self._queue_bytes = identity, max_bytes, queue_bytes
        self._changed = threading.Condition()  # guards everything below
        self._rows: OrderedDict[Key, SnapshotRecord] = OrderedDict()  # the least recently used first
        self._blocks: dict[
            tuple[bytes, bytes], dict[Key, SnapshotRecord]
        ] = {}  # those of this model, by space and anchor
        self._waiting: dict[Key, Snapshot] = {}  # of rows that have not been written yet
        self._touched: set[Key] = set()  # rows whose last use has not been written down
        self._bytes = self._waiting_bytes = self._clock = 0
        self._jobs: deque[Job] = deque()
        self._working = self._warned = False
        self._store = self._opened()
        self._thread = threading.Thread(target=self._work, name="fledge-snapshots", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Snapshots of any model that are in files or wait to be written."""
        return len(self._rows)

    def __enter__(self) -> DiskCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._bytes

    def find_longest(self, namespace: str, path: bytes, least: int) -> StoredSnapshot | None:
        """The longest snapshot of at least `least` tokens that is a prefix of `path`; one of all of it needs logits."""
        while True:
            with self._changed:
                row = self._longest(hash_name(namespace), path, least)
                if row is None or self._store is None:
                    return None
                self._touch(row)
                snapshot = self._waiting.get(row.key)
            if snapshot is None:
                snapshot = self._store.read(row)
            if snapshot is not None:
                return StoredSnapshot(row.length, snapshot)
            self._discard([row])

    def find_lengths(self, namespace: str, path: bytes, lengths: Collection[int]) -> dict[int, bool]:
        """Which of `lengths` of `path` have a snapshot -> whether with logits."""
        found, hashed, place, owner = {}, sha256(), 0, hash_name(namespace)
        with self._changed:
            for length in sorted(lengths):
                hashed.update(path[place * TOKEN_BYTES : length * TOKEN_BYTES])
                place = length
                if (row := self._rows.get((self._identity, owner, hashed.digest()))) is not None:
                    found[length] = bool(row.logits)
        return found

    def put(self, namespace: str, path: bytes, snapshot: Snapshot, *, wait: bool = False) -> None:
        """Have a snapshot written, unless there is one as good. wait: until it has its place in the queue."""
        block = len(path) // (TOKEN_BYTES * BLOCK_TOKENS) * (TOKEN_BYTES * BLOCK_TOKENS)
        row = SnapshotRecord(
            self._identity,
            hash_name(namespace),
            sha256(path).digest(),
            anchor=sha256(path[:block]).digest(),
            length=len(path) // TOKEN_BYTES,
            kind=type(snapshot.state).__name__,
            logits=int(snapshot.logits is not None),
        )
        with self._changed:
            while wait and self._full(snapshot) and self._store is not None:
                self._changed.wait()
            there = self._rows.get(row.key)
            if there is not None and there.logits >= row.logits:
                self._touch(there)
            elif self._store is not None and not self._full(snapshot):
                if there is not None:
                    row.file, row.size = there.file, there.size  # which go when the new file is there
                    self._leave(there)
                self._enter(row)
                self._waiting[row.key] = snapshot
                self._waiting_bytes += snapshot.nbytes
                self._touch(row)
                self._ask(partial(self._write, self._store, row, snapshot))

    def clear(self, namespace: str | None = None) -> None:
        """Remove the snapshots of this model, or those of one space."""
        owner = None if namespace is None else hash_name(namespace)
        with self._changed:
            rows = [row for row in self._rows.values() if row.identity == self._identity]
            self._discard([row for row in rows if owner in (None, row.space)])

    def wait_idle(self) -> None:
        """Wait until everything asked for has been done."""
        with self._changed:
            while self._jobs or self._working:
                self._changed.wait()

    def close(self) -> None:
        """Write what waits, and let go of the folder. Whatever is asked for afterwards is a miss."""
        with self._changed:
            if self._store is not None:
                self._ask(partial(self._note_uses, self._store))
        self.wait_idle()
        with self._changed:
            store, self._store = self._store, None
            self._rows.clear()
            self._blocks.clear()
            self._bytes = 0
            self._changed.notify_all()
        self._thread.join()
        if store is not None:
            store.close()

    def _opened(self) -> SnapshotStore | None:
        try:
            store = SnapshotStore(self.folder)
        except (OSError, sqlite3.Error) as error:
            self._warn(error)
            return None
        for row in store.records:
            self._enter(row)
            self._clock = max(self._clock, row.used)
        self._jobs.append(partial(self._make_room, store, 0))  # the limit may be smaller than it was
        return store

    def _longest(self, owner: bytes, path: bytes, least: int) -> SnapshotRecord | None:
        """The row that `longest` is after."""
        if len(path) < least * TOKEN_BYTES or not self._blocks:
            return None
        hashed, known = sha256(), []
        for begin in range(0, len(path) // TOKEN_BYTES + 1, BLOCK_TOKENS):
            if begin + BLOCK_TOKENS > least and (rows := self._blocks.get((owner, hashed.digest()))):
                known.append((begin, rows, hashed.copy()))
            hashed.update(path[begin * TOKEN_BYTES : (begin + BLOCK_TOKENS) * TOKEN_BYTES])
        for begin, rows, hashed in reversed(known):
            end = min(begin + BLOCK_TOKENS, len(path) // TOKEN_BYTES + 1)
            lengths = range(begin, end) if len(rows) > BLOCK_TOKENS else {row.length for row in rows.values()}
            for length in sorted((length for length in lengths if least <= length < end), reverse=True):
                here = hashed.copy()
                here.update(path[begin * TOKEN_BYTES : length * TOKEN_BYTES])
                row = rows.get((self._identity, owner, here.digest()))
                if row is not None and (row.logits or length * TOKEN_BYTES < len(path)):
                    return row
        return None

    def _enter(self, row: SnapshotRecord) -> None:
        """Put a row into the books."""
        self._rows[row.key] = row
        self._bytes += row.size
        if row.identity == self._identity:
            self._blocks.setdefault((row.space, row.anchor), {})[row.key] = row

    def _leave(self, row: SnapshotRecord) -> bool:
        """Take a row out of the books; whether it was there."""
        if self._rows.get(row.key) is not row:
            return False
        del self._rows[row.key]
        self._bytes -= row.size
        if (waiting := self._waiting.pop(row.key, None)) is not None:
            self._waiting_bytes -= waiting.nbytes
        if (rows := self._blocks.get((row.space, row.anchor))) is not None:
            rows.pop(row.key, None)
            if not rows:
                del self._blocks[row.space, row.anchor]
        return True

    def _touch(self, row: SnapshotRecord) -> None:
        self._clock += 1
        row.used = self._clock
        self._rows.move_to_end(row.key)
        self._touched.add(row.key)

    def _full(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot has to wait for a place in the queue. One of any size may wait alone."""
        return self._waiting_bytes > 0 and self._waiting_bytes + snapshot.nbytes > self._queue_bytes

    def _discard(self, rows: list[SnapshotRecord]) -> None:
        """Remove rows that are in the books."""
        with self._changed:
            gone = [row for row in rows if self._leave(row)]
            if gone and self._store is not None:
                self._ask(partial(self._store.remove, gone))

    def _ask(self, job: Job) -> None:
        self._jobs.append(job)
        self._changed.notify_all()

    def _work(self) -> None:
        """The thread: one job after the other until the store is closed."""
        while True:
            with self._changed:
                self._working = False
                self._changed.notify_all()
                while not self._jobs:
                    if self._store is None:
                        return
                    self._changed.wait()
                job = self._jobs.popleft()
                self._working = True
            try:
                job()
            except Exception as error:  # whatever it is, a cache that ends its engine is worse than none
                self._warn(error)

    def _write(self, store: SnapshotStore, row: SnapshotRecord, snapshot: Snapshot) -> None:
        """Write a row that waits, unless it has been cleared or exchanged since."""
        with self._changed:
            if self._rows.get(row.key) is not row:
                return
        try:
            data = encode_snapshot(snapshot)
            if len(data) > self._max_bytes:
                self._discard([row])
                return
            self._make_room(store, len(data) - row.size)
            done = store.write(row, data)
        except BaseException:
            self._discard([row])
            raise
        with self._changed:
            wanted = self._rows.get(row.key) is row
            if wanted:
                done.used = row.used
                self._rows[row.key] = self._blocks[row.space, row.anchor][row.key] = done
                self._bytes += done.size - row.size
                self._waiting_bytes -= self._waiting.pop(row.key).nbytes
        if wanted:
            self._note_uses(store)
        else:
            store.remove([done])

    def _make_room(self, store: SnapshotStore, size: int) -> None:
        """Remove the least recently used until there is room for `size` bytes more."""
        with self._changed:
            victims, excess = [], self._bytes + size - self._max_bytes
            for row in self._rows.values():
                if excess <= 0:
                    break
                if row.key not in self._waiting:
                    victims.append(row)
                    excess -= row.size
            for row in victims:
                self._leave(row)
        if victims:
            store.remove(victims)

    def _note_uses(self, store: SnapshotStore) -> None:
        """Write down when rows were last used."""
        with self._changed:
            rows = [self._rows[key] for key in self._touched if key in self._rows and key not in self._waiting]
            self._touched.clear()
        store.touch(rows)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning("a snapshot in %s failed (%r); said once, more may fail and are read anew", self.folder, error)
