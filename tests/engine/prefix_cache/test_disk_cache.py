"""Snapshots on the disk: bit for bit after a restart, sound after a kill, and a miss wherever a disk fails."""

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


def put(snapshots: DiskCache, ids: tuple[int, ...], space: str = "a", logits: bool = False) -> None:
    snapshots.put(space, pack_ids(ids), Snapshot(state_of(ids), logits_of(ids) if logits else None), wait=True)


def longest(snapshots: DiskCache, ids: tuple[int, ...], space: str = "a") -> StoredSnapshot | None:
    return snapshots.find_longest(space, pack_ids(ids), 1)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        for length in (3, 128, 200, 256):
            put(snapshots, IDS[:length])
        put(snapshots, IDS, logits=True)
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        for asked, found in ((2, None), (3, None), (4, 3), (129, 128), (201, 200), (256, 200), (290, 256), (300, 300)):
            stored = longest(snapshots, IDS[:asked])
            assert (None if stored is None else stored.length) == found
            assert stored is None or same(stored.snapshot.state, IDS[: stored.length])
        assert longest(snapshots, IDS, space="b") is None
        assert snapshots.find_lengths("a", pack_ids(IDS), [3, 4, 300]) == {3: False, 300: True}
    with DiskCache(tmp_path, "two", max_bytes=LIMIT) as snapshots:
        assert longest(snapshots, IDS) is None and len(snapshots) == 5, "another model's are not read, but counted"


def test_the_least_recently_used_give_way(tmp_path: Path) -> None:
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


def test_a_folder_that_cannot_be_used_is_an_empty_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with DiskCache(tmp_path / "file" / "folder", "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS)
        put(snapshots, IDS[:3])
        snapshots.wait_idle()
        assert longest(snapshots, (*IDS, 1)) is None
    assert len(caplog.records) == 1


def test_a_disk_that_fails_later_is_said_once(
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


def test_what_waits_is_found_and_what_does_not_fit_the_queue_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, write = threading.Event(), SnapshotStore.write

    def slow(store: SnapshotStore, row: SnapshotRecord, data: bytes) -> SnapshotRecord:
        going.wait()
        return write(store, row, data)

    monkeypatch.setattr(SnapshotStore, "write", slow)
    with DiskCache(tmp_path, "one", max_bytes=LIMIT, queue_bytes=int(2.5 * BYTES)) as snapshots:
        for length in (3, 5, 7):
            snapshots.put("a", pack_ids(IDS[:length]), Snapshot(state_of(IDS[:length]), None))
        stored = longest(snapshots, IDS[:20])
        assert stored is not None and stored.length == 5 and same(stored.snapshot.state, IDS[:5])
        assert (len(snapshots), snapshots.nbytes) == (2, 0)
        going.set()
        snapshots.wait_idle()
        assert (len(snapshots), snapshots.nbytes) == (2, 2 * SIZE)


def test_what_waits_does_not_give_way_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DiskCache(tmp_path, "one", max_bytes=2 * SIZE) as snapshots:
        put(snapshots, (1, 9))
        put(snapshots, (2, 9))
        snapshots.wait_idle()
        going = threading.Event()

        def slow(snapshot: Snapshot) -> bytes:
            going.wait()
            return encode_snapshot(snapshot)

        monkeypatch.setattr("fledge.engine.prefix_cache.disk_cache.encode_snapshot", slow)
        put(snapshots, (3, 9))
        assert longest(snapshots, (1, 9, 9)) is not None and longest(snapshots, (2, 9, 9)) is not None
        going.set()
        snapshots.wait_idle()
        assert [first for first in (1, 2, 3) if longest(snapshots, (first, 9, 9)) is not None] == [2, 3]


def test_logits_that_come_later_are_added(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS)
        snapshots.wait_idle()
        assert longest(snapshots, IDS) is None, "nothing to draw the next token from"
        put(snapshots, IDS, logits=True)
        put(snapshots, IDS)
        for _ in range(2):  # as it waits, and from its file
            stored = longest(snapshots, IDS)
            assert stored is not None and same(stored.snapshot.state, IDS)
            assert stored.snapshot.logits is not None and stored.snapshot.logits.equal(logits_of(IDS))
            snapshots.wait_idle()
    (file,) = (tmp_path / "states").iterdir()
    assert snapshots.nbytes == 0 and file.stat().st_size > SIZE


def test_what_is_cleared_is_gone_even_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, going, write = threading.Event(), threading.Event(), SnapshotStore.write

    def slow(store: SnapshotStore, row: SnapshotRecord, data: bytes) -> SnapshotRecord:
        writing.set()
        going.wait()
        return write(store, row, data)

    monkeypatch.setattr(SnapshotStore, "write", slow)
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS[:3])
        put(snapshots, IDS[:5])
        put(snapshots, IDS[:4], space="b")
        writing.wait()
        snapshots.clear("a")
        assert longest(snapshots, IDS[:20]) is None
        put(snapshots, IDS[:3])  # again, behind the removal of the first
        going.set()
        snapshots.wait_idle()
        assert len(list((tmp_path / "states").iterdir())) == len(snapshots) == 2
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        stored = longest(snapshots, IDS[:20])
        assert stored is not None and stored.length == 3
        snapshots.clear()
        snapshots.wait_idle()
        assert list((tmp_path / "states").iterdir()) == []


def test_many_rows_of_one_beginning(tmp_path: Path) -> None:
    """More rows than a block has lengths: another way to the same result."""
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        for last in range(BLOCK_TOKENS + 20):
            row = SnapshotRecord(
                "one", sha256(b"a").digest(), sha256(bytes([last])).digest(), sha256().digest(), length=2
            )
            snapshots._add_record(row)
        put(snapshots, IDS[:70])
        put(snapshots, IDS[:90])
        for asked, length in ((71, 70), (90, 70), (91, 90), (200, 90)):
            stored = longest(snapshots, IDS[:asked])
            assert stored is not None and stored.length == length
        assert snapshots.find_longest("a", pack_ids(IDS), 91) is None


def test_a_smaller_limit_holds_at_once_and_one_that_nothing_fits_keeps_nothing(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "other", max_bytes=LIMIT) as snapshots:
        for length in range(2, 7):
            put(snapshots, IDS[:length])
    with DiskCache(tmp_path, "one", max_bytes=2 * SIZE) as snapshots:
        snapshots.wait_idle()
        assert (len(snapshots), snapshots.nbytes) == (2, 2 * SIZE)
        put(snapshots, IDS)
        snapshots.wait_idle()
        assert (len(snapshots), snapshots.nbytes) == (2, 2 * SIZE), "another model's give way as well"
    with DiskCache(tmp_path, "one", max_bytes=SIZE // 2) as snapshots:
        put(snapshots, IDS)
        snapshots.wait_idle()
        assert (len(snapshots), snapshots.nbytes) == (0, 0)


def test_uses_outlast_a_restart(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        for first in (1, 2, 3):
            put(snapshots, (first, 9))
        snapshots.wait_idle()
        assert longest(snapshots, (1, 9, 9)) is not None
    with DiskCache(tmp_path, "one", max_bytes=2 * SIZE) as snapshots:
        snapshots.wait_idle()
        assert [first for first in (1, 2, 3) if longest(snapshots, (first, 9, 9)) is not None] == [1, 3]


def test_neither_spaces_nor_ids_are_on_the_disk(tmp_path: Path) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS, space="a secret key", logits=True)
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert sha256(b"a secret key").digest() in content
    assert b"secret" not in content and pack_ids(IDS[100:104]) not in content


def test_a_sweep_leaves_the_files_of_others(tmp_path: Path) -> None:
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


def test_an_index_of_another_version_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(tmp_path / SnapshotStore.INDEX)) as index:
        index.execute("PRAGMA user_version = 7")
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS)
    assert len(caplog.records) == 1 and "version 7, not 1" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("index*")) == ["index.damaged", SnapshotStore.INDEX]


@pytest.mark.parametrize(
    ("change", "left"),
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
def test_a_row_that_is_wrong_is_a_miss(tmp_path: Path, change: str, left: int) -> None:
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        put(snapshots, IDS[:3])
    with closing(sqlite3.connect(tmp_path / SnapshotStore.INDEX)) as index, index:
        index.execute(f"UPDATE snapshots {change}")
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        assert len(snapshots) == left
        assert longest(snapshots, IDS[:20]) is None
        put(snapshots, IDS[:3])
    with DiskCache(tmp_path, "one", max_bytes=LIMIT) as snapshots:
        assert longest(snapshots, IDS[:20]) is not None


def test_an_index_damaged_anywhere_never_lies(tmp_path: Path) -> None:
    """Opening goes well, whatever is found is right, and a snapshot can be kept again after at most one restart."""
    with DiskCache(tmp_path / "sound", "one", max_bytes=LIMIT) as snapshots:
        for length in range(1, 41):
            put(snapshots, IDS[:length])
    sound = (tmp_path / "sound" / SnapshotStore.INDEX).read_bytes()
    assert len(sound) > 3 * 4096, "more than one page of rows"
    chooser, begun_anew = random.Random(8), 0
    for attempt in range(30):
        folder = tmp_path / str(attempt)
        shutil.copytree(tmp_path / "sound", folder)
        data = bytearray(sound)
        place, length = chooser.randrange(len(data)), chooser.choice([1, 3, 50, 3000])
        data[place : place + length] = chooser.randbytes(min(length, len(data) - place))
        (folder / SnapshotStore.INDEX).write_bytes(data[: chooser.choice([len(data), len(data), place])])
        for _ in range(2):
            with DiskCache(folder, "one", max_bytes=LIMIT) as snapshots:
                for asked in range(2, 45):
                    stored = longest(snapshots, IDS[:asked])
                    assert stored is None or same(stored.snapshot.state, IDS[: stored.length])
                put(snapshots, IDS)
        with DiskCache(folder, "one", max_bytes=LIMIT) as snapshots:
            assert longest(snapshots, (*IDS, 5)) is not None
        begun_anew += (folder / "index.damaged").exists()
    assert 0 < begun_anew < 30


# Imports once and then is killed again and again, in children of its own. The ids of the number-th snapshot follow from
# the number, every third comes again with logits, and there is room for 5, so that all kinds of writes are cut.
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
        rows = snapshots._store.records
        assert {{row.file for row in rows}} == files(), "a row or a file is alone"
        assert snapshots.nbytes == sum(row.size for row in rows) <= LIMIT
        found = 0
        for kind in range(KINDS):
            ids = [kind, 5, 6]
            if (stored := snapshots.find_longest("a", pack_ids(ids + [7]), 3)) is not None:
                logits = stored.snapshot.logits
                assert same(stored.snapshot.state, ids) and (logits is None or logits.equal(logits_of(ids)))
                found += 1
        assert found == len(rows), "a row could not be read"
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
def test_a_kill_at_any_moment_leaves_a_sound_store(tmp_path: Path) -> None:
    code = KILLED.format(tests=[str(Path(__file__).parent), str(SUPPORT)], folder=str(tmp_path), limit=6 * SIZE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 20 and max(found) > 1, f"the kills came too early to try anything: {found}"
    assert not list(tmp_path.glob("*.damaged"))
