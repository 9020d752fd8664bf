"""`DiskCache`: snapshots on disk, for a cache whose engine never waits for the disk.

All records are in memory. One thread does all writes, in order; until a snapshot is written, it is found in the queue.
A snapshot that exceeds the limit of the queue is dropped. If the files exceed `max_bytes`, the least recently used ones
are deleted.

The longest stored prefix of a prompt is found by hashes, so neither the tree of an earlier process nor the ids are
needed: each record has the SHA-256 of its tokens and of the tokens up to its last complete block of BLOCK_TOKENS tokens
(the anchor). One pass over the prompt finds the anchors that have records. Then the lengths after each anchor are
tried, from the last anchor on. This takes 0.2 ms for 32,768 tokens, and the time grows neither with the number of
records nor with their lengths.

After construction no method raises an error of the disk: a failure is a miss, and the first one is logged.
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

BLOCK_TOKENS = 128
QUEUE_BYTES = 64 << 20

Key = tuple[str, bytes, bytes]
WriteJob = Callable[[], None]


class StoredSnapshot(NamedTuple):
    """A snapshot and the number of tokens that its state has read."""

    length: int
    snapshot: Snapshot


class DiskCache:
    """The snapshots of one model in a folder, used by one thread. Paths are token ids packed by `pack_ids`.

    Snapshots of other models in the same folder are never returned, but they count towards the limit and age as well.
    """

    def __init__(
        self, folder: str | os.PathLike[str], identity: str, *, max_bytes: int, queue_bytes: int = QUEUE_BYTES
    ) -> None:
        """identity: of the model, such as a hash of its weights. max_bytes: of all files. queue_bytes: of the queue.

        Raises UsageError if another process uses the folder. A folder that cannot be used acts as an empty cache, with
        a warning.
        """
        self.folder = Path(folder)
        self._identity, self._max_bytes, self._queue_bytes = identity, max_bytes, queue_bytes
        self._changed = threading.Condition()  # guards all attributes below
        self._records: OrderedDict[Key, SnapshotRecord] = OrderedDict()  # least recently used first
        # The records of this model by namespace and anchor.
        self._anchored: dict[tuple[bytes, bytes], dict[Key, SnapshotRecord]] = {}
        self._queued: dict[Key, Snapshot] = {}  # snapshots that are not written yet
        self._touched: set[Key] = set()  # records whose last use is not stored yet
        self._bytes = self._queued_bytes = self._use_count = 0
        self._jobs: deque[WriteJob] = deque()
        self._is_working = self._has_warned = False
        self._store = self._open_store()
        self._thread = threading.Thread(target=self._work, name="fledge-snapshots", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Snapshots of all models, in files or in the queue."""
        return len(self._records)

    def __enter__(self) -> DiskCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._bytes

    def find_longest(self, namespace: str, path: bytes, min_length: int) -> StoredSnapshot | None:
        """The longest snapshot of at least `min_length` tokens that is a prefix of `path`.

        A snapshot of the whole path is returned only if it has logits.
        """
        while True:
            with self._changed:
                record = self._find_record(hash_name(namespace), path, min_length)
                if record is None or self._store is None:
                    return None
                self._touch(record)
                snapshot = self._queued.get(record.key)
            if snapshot is None:
                snapshot = self._store.read(record)
            if snapshot is not None:
                return StoredSnapshot(record.length, snapshot)
            self._discard([record])

    def find_lengths(self, namespace: str, path: bytes, lengths: Collection[int]) -> dict[int, bool]:
        """Which prefixes of `path` have a snapshot: length -> whether it has logits."""
        stored, digest, position, namespace_hash = {}, sha256(), 0, hash_name(namespace)
        with self._changed:
            for length in sorted(lengths):
                digest.update(path[position * TOKEN_BYTES : length * TOKEN_BYTES])
                position = length
                record = self._records.get((self._identity, namespace_hash, digest.digest()))
                if record is not None:
                    stored[length] = bool(record.has_logits)
        return stored

    def put(self, namespace: str, path: bytes, snapshot: Snapshot, *, wait: bool = False) -> None:
        """Queue a snapshot to be written, unless an equivalent one is stored. wait: wait for space in the queue."""
        anchor_bytes = len(path) // (TOKEN_BYTES * BLOCK_TOKENS) * (TOKEN_BYTES * BLOCK_TOKENS)
        record = SnapshotRecord(
            self._identity,
            hash_name(namespace),
            sha256(path).digest(),
            anchor_hash=sha256(path[:anchor_bytes]).digest(),
            length=len(path) // TOKEN_BYTES,
            state_class=type(snapshot.state).__name__,
            has_logits=int(snapshot.logits is not None),
        )
        with self._changed:
            while wait and self._is_queue_full(snapshot) and self._store is not None:
                self._changed.wait()
            existing = self._records.get(record.key)
            if existing is not None and existing.has_logits >= record.has_logits:
                self._touch(existing)
            elif self._store is not None and not self._is_queue_full(snapshot):
                if existing is not None:
                    record.file, record.size = existing.file, existing.size  # deleted when the new file is written
                    self._remove_record(existing)
                self._add_record(record)
                self._queued[record.key] = snapshot
                self._queued_bytes += snapshot.nbytes
                self._touch(record)
                self._enqueue(partial(self._write, self._store, record, snapshot))

    def clear(self, namespace: str | None = None) -> None:
        """Delete the snapshots of this model, or those of one namespace."""
        namespace_hash = None if namespace is None else hash_name(namespace)
        with self._changed:
            own = [record for record in self._records.values() if record.identity == self._identity]
            self._discard([record for record in own if namespace_hash in (None, record.namespace_hash)])

    def wait_idle(self) -> None:
        """Wait until all queued work is done."""
        with self._changed:
            while self._jobs or self._is_working:
                self._changed.wait()

    def close(self) -> None:
        """Write the queued snapshots and release the folder. Every later lookup is a miss."""
        with self._changed:
            if self._store is not None:
                self._enqueue(partial(self._store_uses, self._store))
        self.wait_idle()
        with self._changed:
            store, self._store = self._store, None
            self._records.clear()
            self._anchored.clear()
            self._bytes = 0
            self._changed.notify_all()
        self._thread.join()
        if store is not None:
            store.close()

    def _open_store(self) -> SnapshotStore | None:
        try:
            store = SnapshotStore(self.folder)
        except (OSError, sqlite3.Error) as error:
            self._warn(error)
            return None
        for record in store.records:
            self._add_record(record)
            self._use_count = max(self._use_count, record.last_used)
        self._jobs.append(partial(self._evict_for, store, 0))  # the limit may be lower than before
        return store

    def _find_record(self, namespace_hash: bytes, path: bytes, min_length: int) -> SnapshotRecord | None:
        """The record that `find_longest` returns."""
        if len(path) < min_length * TOKEN_BYTES or not self._anchored:
            return None
        digest, anchors = sha256(), []
        for begin in range(0, len(path) // TOKEN_BYTES + 1, BLOCK_TOKENS):
            records = self._anchored.get((namespace_hash, digest.digest()))
            if begin + BLOCK_TOKENS > min_length and records:
                anchors.append((begin, records, digest.copy()))
            digest.update(path[begin * TOKEN_BYTES : (begin + BLOCK_TOKENS) * TOKEN_BYTES])
        for begin, records, digest in reversed(anchors):
            end = min(begin + BLOCK_TOKENS, len(path) // TOKEN_BYTES + 1)
            many = len(records) > BLOCK_TOKENS
            lengths = range(begin, end) if many else {record.length for record in records.values()}
            for length in sorted((length for length in lengths if min_length <= length < end), reverse=True):
                prefix = digest.copy()
                prefix.update(path[begin * TOKEN_BYTES : length * TOKEN_BYTES])
                record = records.get((self._identity, namespace_hash, prefix.digest()))
                if record is not None and (record.has_logits or length * TOKEN_BYTES < len(path)):
                    return record
        return None

    def _add_record(self, record: SnapshotRecord) -> None:
        self._records[record.key] = record
        self._bytes += record.size
        if record.identity == self._identity:
            self._anchored.setdefault((record.namespace_hash, record.anchor_hash), {})[record.key] = record

    def _remove_record(self, record: SnapshotRecord) -> bool:
        """Remove a record from memory. Returns whether it was there."""
        if self._records.get(record.key) is not record:
            return False
        del self._records[record.key]
        self._bytes -= record.size
        if (queued := self._queued.pop(record.key, None)) is not None:
            self._queued_bytes -= queued.nbytes
        if (records := self._anchored.get((record.namespace_hash, record.anchor_hash))) is not None:
            records.pop(record.key, None)
            if not records:
                del self._anchored[record.namespace_hash, record.anchor_hash]
        return True

    def _touch(self, record: SnapshotRecord) -> None:
        """Make a record the most recently used one."""
        self._use_count += 1
        record.last_used = self._use_count
        self._records.move_to_end(record.key)
        self._touched.add(record.key)

    def _is_queue_full(self, snapshot: Snapshot) -> bool:
        """Whether there is no space for a snapshot in the queue. An empty queue accepts any size."""
        return self._queued_bytes > 0 and self._queued_bytes + snapshot.nbytes > self._queue_bytes

    def _discard(self, records: list[SnapshotRecord]) -> None:
        """Remove records from memory, and queue the deletion of their files."""
        with self._changed:
            removed = [record for record in records if self._remove_record(record)]
            if removed and self._store is not None:
                self._enqueue(partial(self._store.remove, removed))

    def _enqueue(self, job: WriteJob) -> None:
        self._jobs.append(job)
        self._changed.notify_all()

    def _work(self) -> None:
        """The thread: do one job after the other until the store is closed."""
        while True:
            with self._changed:
                self._is_working = False
                self._changed.notify_all()
                while not self._jobs:
                    if self._store is None:
                        return
                    self._changed.wait()
                job = self._jobs.popleft()
                self._is_working = True
            try:
                job()
            except Exception as error:  # no failure of a cache may end the engine
                self._warn(error)

    def _write(self, store: SnapshotStore, record: SnapshotRecord, snapshot: Snapshot) -> None:
        """Write a queued snapshot, unless it was removed or replaced since."""
        with self._changed:
            if self._records.get(record.key) is not record:
                return
        try:
            data = encode_snapshot(snapshot)
            if len(data) > self._max_bytes:
                self._discard([record])
                return
            self._evict_for(store, len(data) - record.size)
            written = store.write(record, data)
        except BaseException:
            self._discard([record])
            raise
        with self._changed:
            is_current = self._records.get(record.key) is record
            if is_current:
                written.last_used = record.last_used
                self._records[record.key] = written
                self._anchored[record.namespace_hash, record.anchor_hash][record.key] = written
                self._bytes += written.size - record.size
                self._queued_bytes -= self._queued.pop(record.key).nbytes
        if is_current:
            self._store_uses(store)
        else:
            store.remove([written])

    def _evict_for(self, store: SnapshotStore, size: int) -> None:
        """Delete the least recently used snapshots until `size` more bytes fit."""
        with self._changed:
            evicted, excess = [], self._bytes + size - self._max_bytes
            for record in self._records.values():
                if excess <= 0:
                    break
                if record.key not in self._queued:
                    evicted.append(record)
                    excess -= record.size
            for record in evicted:
                self._remove_record(record)
        if evicted:
            store.remove(evicted)

    def _store_uses(self, store: SnapshotStore) -> None:
        """Write to the index when records were last used."""
        with self._changed:
            touched = [self._records[key] for key in self._touched if key in self._records and key not in self._queued]
            self._touched.clear()
        store.touch(touched)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "the prefix cache in %s failed (%r); prompts are computed again, and later failures are not logged",
                self.folder,
                error,
            )
