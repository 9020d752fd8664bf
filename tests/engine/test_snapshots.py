"""Snapshots on the disk: bit for bit after a restart, sound after a kill, and a miss wherever a disk fails."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefixes import logits_of, same, state_of

from fledge.core.errors import UsageError
from fledge.engine.radix import packed
from fledge.engine.snapshot_store import INDEX, Snapshot, encoded
from fledge.engine.snapshots import Snapshots, Stored

LIMIT = 1 << 20
IDS = tuple(range(300))
SIZE = len(encoded(Snapshot(state_of(IDS), None)))


def put(snapshots: Snapshots, ids: tuple[int, ...], space: str = "a", logits: bool = False) -> None:
    snapshots.put(space, packed(ids), Snapshot(state_of(ids), logits_of(ids) if logits else None), wait=True)


def longest(snapshots: Snapshots, ids: tuple[int, ...], space: str = "a") -> Stored | None:
    return snapshots.longest(space, packed(ids), 1)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    with Snapshots(tmp_path, "one", limit=LIMIT) as snapshots:
        for length in (3, 128, 200, 256):
            put(snapshots, IDS[:length])
        put(snapshots, IDS, logits=True)
    with Snapshots(tmp_path, "one", limit=LIMIT) as snapshots:
        for asked, found in ((2, None), (3, None), (4, 3), (129, 128), (201, 200), (256, 200), (290, 256), (300, 300)):
            stored = longest(snapshots, IDS[:asked])
            assert (None if stored is None else stored.length) == found
            assert stored is None or same(stored.snapshot.state, IDS[: stored.length])
        assert longest(snapshots, IDS, space="b") is None
        assert snapshots.kept("a", packed(IDS), [3, 4, 300]) == {3: False, 300: True}
    with Snapshots(tmp_path, "two", limit=LIMIT) as snapshots:
        assert longest(snapshots, IDS) is None and len(snapshots) == 5, "another model's are not read, but counted"


def test_the_least_recently_used_give_way(tmp_path: Path) -> None:
    with Snapshots(tmp_path, "one", limit=int(4.5 * SIZE)) as snapshots:
        for first in range(1, 5):
            put(snapshots, (first, 9))
        snapshots.drain()
        assert longest(snapshots, (1, 9, 9)) is not None
        put(snapshots, (5, 9))
        snapshots.drain()
        assert [first for first in range(1, 6) if longest(snapshots, (first, 9, 9)) is not None] == [1, 3, 4, 5]
        assert snapshots.nbytes <= 4.5 * SIZE
    assert len(list((tmp_path / "states").iterdir())) == 4


def test_damaged_files_are_misses(tmp_path: Path) -> None:
    with Snapshots(tmp_path, "one", limit=LIMIT) as snapshots:
        put(snapshots, IDS[:5])
        put(snapshots, IDS[:9])
        snapshots.drain()
        files = sorted((tmp_path / "states").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        data = bytearray(files[1].read_bytes())
        data[-3] ^= 1
        files[1].write_bytes(data)
        stored = longest(snapshots, IDS[:20])
        assert stored is not None and stored.length == 5
        files[0].unlink()
        assert longest(snapshots, IDS[:20]) is None
    (tmp_path / INDEX).write_bytes(b"no database" * 500)
    with Snapshots(tmp_path, "one", limit=LIMIT) as snapshots:
        assert len(snapshots) == 0
        put(snapshots, IDS[:5])
    with Snapshots(tmp_path, "one", limit=LIMIT) as snapshots:
        assert longest(snapshots, IDS[:20]) is not None


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Snapshots(tmp_path, "one", limit=LIMIT):
        code = f"from fledge.engine.snapshots import Snapshots; Snapshots({str(tmp_path)!r}, 'one', limit=9)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process keeps its snapshots there" in other.stderr.splitlines()[-1]
        with pytest.raises(UsageError, match="another process"):
            Snapshots(tmp_path, "one", limit=LIMIT)


def test_a_folder_that_cannot_be_used_is_an_empty_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with Snapshots(tmp_path / "file" / "folder", "one", limit=LIMIT) as snapshots:
        put(snapshots, IDS)
        put(snapshots, IDS[:3])
        snapshots.drain()
        assert longest(snapshots, (*IDS, 1)) is None
    assert len(caplog.records) == 1


def test_a_disk_that_fails_later_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Snapshots(tmp_path, "one", limit=LIMIT) as snapshots:
        put(snapshots, IDS[:3])
        snapshots.drain()

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        for length in (5, 6):
            put(snapshots, IDS[:length])
        snapshots.drain()
        stored = longest(snapshots, IDS[:20])
        assert stored is not None and stored.length == 3
    assert len(caplog.records) == 1 and "No space left" in caplog.text


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from prefixes import state_of
from fledge.engine.radix import packed
from fledge.engine.snapshot_store import Snapshot
from fledge.engine.snapshots import Snapshots
snapshots = Snapshots({folder!r}, "one", limit={limit})
print("open", flush=True)
for number in range({begin}, 10**9):
    snapshots.put("a", packed([number % 97, number]), Snapshot(state_of([number % 97, number]), None), wait=True)
"""


def test_a_kill_at_any_moment_leaves_a_sound_store(tmp_path: Path) -> None:
    chooser, most = random.Random(4), 0
    for attempt in range(6):
        code = WRITER.format(
            tests=str(Path(__file__).parent), folder=str(tmp_path), limit=20 * SIZE, begin=attempt * 100_000
        )
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "open\n"
        time.sleep(chooser.uniform(0.0, 0.25))
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        with Snapshots(tmp_path, "one", limit=20 * SIZE) as snapshots:
            assert snapshots._store is not None
            rows = snapshots._store.rows
            assert {row.file for row in rows} == {path.name for path in (tmp_path / "states").iterdir()}
            for row in rows:
                found = snapshots._store.read(row)
                assert found is not None and found.state.nbytes > 0
            most = max(most, len(rows))
            assert snapshots.nbytes <= 20 * SIZE
    assert most > 3, "the kills came too early to try anything"
    assert not list(tmp_path.glob("*.damaged"))
