"""The snapshot store: reading, cleanup when it is opened, and damaged or full indexes."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from prefixes import logits_of, same, state_of

from fledge.engine.prefix_cache.disk_store import Snapshot, SnapshotRecord, SnapshotStore, encode_snapshot
from fledge.models.state import State


def record(number: int) -> SnapshotRecord:
    return SnapshotRecord(
        "model", b"space", b"ids %d" % number, b"anchor", length=number, state_class="WkvState", has_logits=1
    )


def fill(store: SnapshotStore, *numbers: int) -> list[SnapshotRecord]:
    return [
        store.write(record(number), encode_snapshot(Snapshot(state_of([number]), logits_of([number]))))
        for number in numbers
    ]


def file_names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "states").iterdir()}


def test_snapshots_are_read_with_the_same_bits(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    first, _ = fill(store, 3, 5)
    store.close()
    store = SnapshotStore(tmp_path)
    assert first in store.records and len(store.records) == 2
    found = store.read(first)
    assert found is not None and found.logits is not None
    assert same(found.state, [3]) and found.logits.equal(logits_of([3]))
    store.close()


def test_a_snapshot_without_logits_is_a_state_file(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(encode_snapshot(Snapshot(state_of([3]), None)))
    assert same(State.load(tmp_path / "state"), [3])


def test_a_new_record_replaces_the_old_one_and_its_file(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    (old,) = fill(store, 3)
    new = store.write(old, encode_snapshot(Snapshot(state_of([3]), logits_of([3]))))
    assert file_names(tmp_path) == {new.file} and new.file != old.file
    store.close()
    store = SnapshotStore(tmp_path)
    assert store.records == [new]
    store.close()


def test_opening_deletes_rows_without_files_and_files_without_rows(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    kept, gone, short = fill(store, 3, 5, 7)
    store.close()
    states = tmp_path / "states"
    (states / gone.file).unlink()
    (states / short.file).write_bytes(b"short")
    (states / f"{'0' * 32}.safetensors").write_bytes(b"without a row")
    (states / f".{'0' * 32}.safetensors.x1_y.part").write_bytes(b"half")
    (states / "mine.safetensors").write_bytes(b"a file of the user")
    store = SnapshotStore(tmp_path)
    assert store.records == [kept] and file_names(tmp_path) == {kept.file, "mine.safetensors"}
    store.close()


def test_files_are_deleted_even_if_the_index_cannot_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SnapshotStore(tmp_path)
    records = fill(store, 3, 5)

    def full(*arguments: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store, "_delete_rows", full)
    with pytest.raises(sqlite3.OperationalError):
        store.remove(records[:1])
    assert file_names(tmp_path) == {records[1].file} and store.read(records[0]) is None
    store.close()
    store = SnapshotStore(tmp_path)
    assert store.records == records[1:]
    store.close()


@pytest.mark.parametrize("damage", [b"no database" * 500, b""])
def test_a_damaged_index_is_replaced(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = SnapshotStore(tmp_path)
    fill(store, 3)
    store.close()
    (tmp_path / SnapshotStore.INDEX).write_bytes(damage)
    store = SnapshotStore(tmp_path)
    assert store.records == [] and file_names(tmp_path) == set()
    kept = fill(store, 5)
    store.close()
    store = SnapshotStore(tmp_path)
    assert store.records == kept
    store.close()
    assert len(caplog.records) == (tmp_path / "index.damaged").exists() == bool(damage), "an empty index is not damaged"


def test_an_index_of_another_version_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = SnapshotStore(tmp_path)
    store._index.execute("PRAGMA user_version = 9")
    store.close()
    SnapshotStore(tmp_path).close()
    assert "version 9, not 1" in caplog.text and (tmp_path / "index.damaged").exists()
