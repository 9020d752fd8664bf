"""The disk cache: the same bits after a restart, consistency after a kill, and misses if the disk fails."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest
from prefixes import BYTES, logits_of, same, state_of

from fledge.core.errors import UsageError
from fledge.engine.prefix_cache.disk_cache import BLOCK_TOKENS, DiskCache, StoredSnapshot
from fledge.engine.prefix_cache.disk_store import Snapshot, SnapshotRecord, SnapshotStore, encode_snapshot
from fledge.engine.prefix_cache.radix_tree import pack_ids

SUPPORT = Path(__file__).resolve().parents[2] / "support"

LIMIT = 1 << 20
IDS = tuple(range(300))
SIZE = len(encode_snapshot(Snapshot(state_of(IDS), None)))


def put(snapshots: DiskCache, ids: tuple[int, ...], namespace: str = "a", logits: bool = False) -> None:
    snapshots.put(namespace, pack_ids(ids), Snapshot(state_of(ids), logits_of(ids) if logits else None), wait=True)


def longest(snapshots: DiskCache, ids: tuple[int, ...], namespace: str = "a") -> StoredSnapshot | None:
    return snapshots.find_longest(namespace, pack_ids(ids), 1)


def test_snapshots_survive_a_restart(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        for length in (3, 128, 200, 256):
            put(snapshots, IDS[:length])
        put(snapshots, IDS, logits=True)
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        for prompt, expected in (
            (2, None),
            (3, None),
            (4, 3),
            (129, 128),
            (201, 200),
            (256, 200),
            (290, 256),
            (300, 300),
        ):
            stored = longest(snapshots, IDS[:prompt])
            assert (None if stored is None else stored.length) == expected
            assert stored is None or same(stored.snapshot.state, IDS[: stored.length])
        assert longest(snapshots, IDS, namespace="b") is None
        assert snapshots.find_lengths("a", pack_ids(IDS), [3, 4, 300]) == {3: False, 300: True}
    with DiskCache(tmp_path, "two", max_bytes=LIMIT) as snapshots:
        assert longest(snapshots, IDS) is None and len(snapshots) == 5, (
            "snapshots of another model are counted, but not returned"
        )


def test_the_least_recently_used_snapshots_are_evicted(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=int(4.5 * SIZE)) as snapshots:
        for first in range(1, 5):
            put(snapshots, (first, 9))
        snapshots.wait_idle()
        assert longest(snapshots, (1, 9, 9)) is not None
        put(snapshots, (5, 9))
        snapshots.wait_idle()
        assert [first for first in range(1, 6) if longest(snapshots, (first, 9, 9)) is not None] == [1, 3, 4, 5]
        assert snapshots.nbytes <= 4.5 * SIZE
    assert len(list((tmp_path / "states").iterdir())) == 4


def test_damaged_files_are_misses(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS[:5])
        put(snapshots, IDS[:9])
        snapshots.wait_idle()
        files = sorted((tmp_path / "states").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        data = bytearray(files[1].read_bytes())
        data[-3] ^= 1
        files[1].write_bytes(data)
        stored = longest(snapshots, IDS[:20])
        assert stored is not None and stored.length == 5
        files[0].unlink()
        assert longest(snapshots, IDS[:20]) is None
    (tmp_path / SnapshotStore.INDEX).write_bytes(b"no database" * 500)
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        assert len(snapshots) == 0
        put(snapshots, IDS[:5])
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        assert longest(snapshots, IDS[:20]) is not None


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT):
        module = "fledge.engine.prefix_cache.disk_cache"
        code = f"from {module} import DiskCache; DiskCache({str(tmp_path)!r}, 'one', max_bytes=9)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process uses this folder for its snapshots" in other.stderr.splitlines()[-1]
        with pytest.raises(UsageError, match="another process"):
            DiskCache(tmp_path, "one", max_bytes=LIMIT)


def test_a_folder_that_cannot_be_used_acts_as_an_empty_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with DiskCache(tmp_path / "file" / "folder", "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS)
        put(snapshots, IDS[:3])
        snapshots.wait_idle()
        assert longest(snapshots, (*IDS, 1)) is None
    assert len(caplog.records) == 1


def test_a_disk_that_fails_later_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS[:3])
        snapshots.wait_idle()

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        for length in (5, 6):
            put(snapshots, IDS[:length])
        snapshots.wait_idle()
        stored = longest(snapshots, IDS[:20])
        assert stored is not None and stored.length == 3
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_queued_snapshots_are_found_and_the_queue_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), SnapshotStore.write

    def slow(store: SnapshotStore, record: SnapshotRecord, data: bytes) -> SnapshotRecord:
        may_write.wait()
        return write(store, record, data)

    monkeypatch.setattr(SnapshotStore, "write", slow)
    with DiskCache(tmp_path, "one", max_bytes=LIMIT, queue_bytes=int(2.5 * BYTES)) as snapshots:
        for length in (3, 5, 7):
            snapshots.put("a", pack_ids(IDS[:length]), Snapshot(state_of(IDS[:length]), None))
        stored = longest(snapshots, IDS[:20])
        assert stored is not None and stored.length == 5 and same(stored.snapshot.state, IDS[:5])
        assert (len(snapshots), snapshots.nbytes) == (2, 0)
        may_write.set()
        snapshots.wait_idle()
        assert (len(snapshots), snapshots.nbytes) == (2, 2 * SIZE)


def test_queued_snapshots_are_not_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DiskCache(tmp_path, "one", max_bytes=2 * SIZE) as snapshots:
        put(snapshots, (1, 9))
        put(snapshots, (2, 9))
        snapshots.wait_idle()
        may_write = threading.Event()

        def slow(snapshot: Snapshot) -> bytes:
            may_write.wait()
            return encode_snapshot(snapshot)

        monkeypatch.setattr("fledge.engine.prefix_cache.disk_cache.encode_snapshot", slow)
        put(snapshots, (3, 9))
        assert longest(snapshots, (1, 9, 9)) is not None and longest(snapshots, (2, 9, 9)) is not None
        may_write.set()
        snapshots.wait_idle()
        assert [first for first in (1, 2, 3) if longest(snapshots, (first, 9, 9)) is not None] == [2, 3]


def test_logits_are_added_to_an_existing_snapshot(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS)
        snapshots.wait_idle()
        assert longest(snapshots, IDS) is None, "without logits no token can be sampled"
        put(snapshots, IDS, logits=True)
        put(snapshots, IDS)
        for _ in range(2):  # from the queue, and from its file
            stored = longest(snapshots, IDS)
            assert stored is not None and same(stored.snapshot.state, IDS)
            assert stored.snapshot.logits is not None and stored.snapshot.logits.equal(logits_of(IDS))
            snapshots.wait_idle()
    (file,) = (tmp_path / "states").iterdir()
    assert snapshots.nbytes == 0 and file.stat().st_size > SIZE


def test_clear_while_a_snapshot_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_writing, may_write, write = threading.Event(), threading.Event(), SnapshotStore.write

    def slow(store: SnapshotStore, record: SnapshotRecord, data: bytes) -> SnapshotRecord:
        is_writing.set()
        may_write.wait()
        return write(store, record, data)

    monkeypatch.setattr(SnapshotStore, "write", slow)
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS[:3])
        put(snapshots, IDS[:5])
        put(snapshots, IDS[:4], namespace="b")
        is_writing.wait()
        snapshots.clear("a")
        assert longest(snapshots, IDS[:20]) is None
        put(snapshots, IDS[:3])  # again, after the deletion of the first
        may_write.set()
        snapshots.wait_idle()
        assert len(list((tmp_path / "states").iterdir())) == len(snapshots) == 2
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        stored = longest(snapshots, IDS[:20])
        assert stored is not None and stored.length == 3
        snapshots.clear()
        snapshots.wait_idle()
        assert list((tmp_path / "states").iterdir()) == []


def test_many_records_with_one_anchor(tmp_path: Path) -> None:
    """More records than lengths in a block, so every length is tried."""
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        for last in range(BLOCK_TOKENS + 20):
            record = SnapshotRecord(
                "one", sha256(b"a").digest(), sha256(bytes([last])).digest(), sha256().digest(), length=2
            )
            snapshots._add_record(record)
        put(snapshots, IDS[:70])
        put(snapshots, IDS[:90])
        for prompt, length in ((71, 70), (90, 70), (91, 90), (200, 90)):
            stored = longest(snapshots, IDS[:prompt])
            assert stored is not None and stored.length == length
        assert snapshots.find_longest("a", pack_ids(IDS), 91) is None


def test_a_lower_limit_applies_when_the_folder_is_opened(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "other", max_bytes=LIMIT) as snapshots:
        for length in range(2, 7):
            put(snapshots, IDS[:length])
    with DiskCache(tmp_path, "one", max_bytes=2 * SIZE) as snapshots:
        snapshots.wait_idle()
        assert (len(snapshots), snapshots.nbytes) == (2, 2 * SIZE)
        put(snapshots, IDS)
        snapshots.wait_idle()
        assert (len(snapshots), snapshots.nbytes) == (2, 2 * SIZE), "snapshots of another model are evicted too"
    with DiskCache(tmp_path, "one", max_bytes=SIZE // 2) as snapshots:
        put(snapshots, IDS)
        snapshots.wait_idle()
        assert (len(snapshots), snapshots.nbytes) == (0, 0)


def test_the_order_of_eviction_survives_a_restart(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        for first in (1, 2, 3):
            put(snapshots, (first, 9))
        snapshots.wait_idle()
        assert longest(snapshots, (1, 9, 9)) is not None
    with DiskCache(tmp_path, "one", max_bytes=2 * SIZE) as snapshots:
        snapshots.wait_idle()
        assert [first for first in (1, 2, 3) if longest(snapshots, (first, 9, 9)) is not None] == [1, 3]


def test_the_disk_holds_neither_namespaces_nor_ids(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS, namespace="a secret key", logits=True)
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert sha256(b"a secret key").digest() in content
    assert b"secret" not in content and pack_ids(IDS[100:104]) not in content


def test_files_of_others_are_not_deleted(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS)
    states = tmp_path / "states"
    (file,) = states.iterdir()
    others = [tmp_path / "model.safetensors", states / "model.safetensors", states / "notes"]
    orphans = [states / f"{'0a' * 16}.safetensors", states / f".{'0a' * 16}.safetensors.x1.part"]
    for path in (*others, *orphans):
        path.write_bytes(file.read_bytes())
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        assert len(snapshots) == 1
    assert {*states.iterdir()} == {file, *others[1:]} and others[0].exists()


def test_an_index_of_another_version_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(tmp_path / SnapshotStore.INDEX)) as index:
        index.execute("PRAGMA user_version = 7")
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS)
    assert len(caplog.records) == 1 and "version 7, not 1" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("index*")) == ["index.damaged", SnapshotStore.INDEX]


@pytest.mark.parametrize(
    ("change", "records"),
    [
        ("SET size = size + 1", 0),
        ("SET file = '../index.sqlite'", 0),
        ("SET length = 'many'", 0),
        ("SET dtype = 'bfloat16'", 0),
        ("SET used = 9223372036854775807", 0),
        ("SET checksum = 1", 1),
        ("SET kind = 'Rwkv4State'", 1),
        ("SET logits = 1", 1),
    ],
)
def test_a_wrong_row_is_a_miss(tmp_path: Path, change: str, records: int) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS[:3])
    with closing(sqlite3.connect(tmp_path / SnapshotStore.INDEX)) as index, index:
        index.execute(f"UPDATE snapshots {change}")
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        assert len(snapshots) == records
        assert longest(snapshots, IDS[:20]) is None
        put(snapshots, IDS[:3])
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        assert longest(snapshots, IDS[:20]) is not None


def test_an_index_damaged_at_any_position(tmp_path: Path) -> None:
    """The folder can be opened, every match is correct, and snapshots are stored again after at most one restart."""
    with DiskCache(tmp_path / "intact", "one", max_bytes=LIMIT) as snapshots:
        for length in range(1, 41):
            put(snapshots, IDS[:length])
    intact = (tmp_path / "intact" / SnapshotStore.INDEX).read_bytes()
    assert len(intact) > 3 * 4096, "more than one page of rows"
    chooser, replaced = random.Random(8), 0
    for attempt in range(30):
        folder = tmp_path / str(attempt)
        shutil.copytree(tmp_path / "intact", folder)
        data = bytearray(intact)
        place, length = chooser.randrange(len(data)), chooser.choice([1, 3, 50, 3000])
        data[place : place + length] = chooser.randbytes(min(length, len(data) - place))
        (folder / SnapshotStore.INDEX).write_bytes(data[: chooser.choice([len(data), len(data), place])])
        for _ in range(2):
            with DiskCache(folder, "one", max_bytes=LIMIT) as snapshots:
                for prompt in range(2, 45):
                    stored = longest(snapshots, IDS[:prompt])
                    assert stored is None or same(stored.snapshot.state, IDS[: stored.length])
                put(snapshots, IDS)
        with DiskCache(folder, "one", max_bytes=LIMIT) as snapshots:
            assert longest(snapshots, (*IDS, 5)) is not None
        replaced += (folder / "index.damaged").exists()
    assert 0 < replaced < 30


# The process forks children and kills them. The ids of a snapshot follow from its number, every third one is written
# again with logits, and the limit allows 5 snapshots, so the kills interrupt all kinds of writes.
KILLED = """
import os, random, signal, sys, time
sys.path[:0] = {tests!r}
from prefixes import logits_of, same, state_of
from fledge.engine.prefix_cache.radix_tree import pack_ids
from fledge.engine.prefix_cache.disk_store import Snapshot
from fledge.engine.prefix_cache.disk_cache import DiskCache

KINDS, LIMIT, STATES = 25, {limit}, {folder!r} + "/states"

def files():
    return set(os.listdir(STATES)) if os.path.exists(STATES) else set()

def write(begin):
    snapshots = DiskCache({folder!r}, "one", max_bytes=LIMIT, queue_bytes=3000)
    for number in range(begin, 10**9):
        ids = [number % KINDS, 5, 6]
        if number % 3 == 0:
            snapshots.put("a", pack_ids(ids), Snapshot(state_of(ids), None), wait=True)
        snapshots.put("a", pack_ids(ids), Snapshot(state_of(ids), logits_of(ids)), wait=True)
        if number % 40 == 39:
            snapshots.clear("a")

def verify():
    with DiskCache({folder!r}, "one", max_bytes=LIMIT) as snapshots:
        records = snapshots._store.records
        assert {{record.file for record in records}} == files(), "a row without a file, or a file without a row"
        assert snapshots.nbytes == sum(record.size for record in records) <= LIMIT
        found = 0
        for kind in range(KINDS):
            ids = [kind, 5, 6]
            if (stored := snapshots.find_longest("a", pack_ids(ids + [7]), 3)) is not None:
                logits = stored.snapshot.logits
                assert same(stored.snapshot.state, ids) and (logits is None or logits.equal(logits_of(ids)))
                found += 1
        assert found == len(records), "a snapshot could not be read"
    return found

chooser, found = random.Random(4), []
for attempt in range(20):
    before = files()
    child = os.fork()
    if child == 0:
        write(attempt * 7)
    while files() == before:
        time.sleep(0.001)
    time.sleep(chooser.uniform(0.0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found.append(verify())
print(found)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_consistent_store(tmp_path: Path) -> None:
    code = KILLED.format(tests=[str(Path(__file__).parent), str(SUPPORT)], folder=str(tmp_path), limit=6 * SIZE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 20 and max(found) > 1, f"the kills came before the first write: {found}"
    assert not list(tmp_path.glob("*.damaged"))
