"""Locks between processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fledge.core.locks import LOCK_NAME, lock_file, try_lock_folder

HOLDER = """
import sys
from pathlib import Path
from fledge.core.locks import try_lock_folder
with try_lock_folder(Path(sys.argv[1])) as is_locked:
    print(is_locked, flush=True)
    sys.stdin.read()
"""


def test_folder_has_one_holder_at_a_time(tmp_path: Path) -> None:
    with try_lock_folder(tmp_path / "new") as first:
        with try_lock_folder(tmp_path / "new") as second:
            assert first and not second
        with try_lock_folder(tmp_path / "new") as third:
            assert not third, "the block that failed to lock the folder has released the lock"
    with try_lock_folder(tmp_path / "new") as is_locked:
        assert is_locked
    assert [path.name for path in (tmp_path / "new").iterdir()] == [LOCK_NAME]


def test_killed_process_releases_its_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        with try_lock_folder(tmp_path) as is_locked:
            assert not is_locked
        process.kill()
        process.wait()
        with try_lock_folder(tmp_path) as is_locked:
            assert is_locked


def test_another_thread_can_release_a_lock(tmp_path: Path) -> None:
    lock = try_lock_folder(tmp_path)
    assert lock.__enter__()
    thread = threading.Thread(target=lock.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    with try_lock_folder(tmp_path) as is_locked:
        assert is_locked


@pytest.mark.parametrize("is_made_again", [False, True])
def test_folder_that_was_moved_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_made_again: bool) -> None:
    """A process that opened the lock file before the move and locks it after the move does not hold the folder."""
    fcntl = pytest.importorskip("fcntl")
    folder, moved = tmp_path / "folder", tmp_path / "moved"
    flock, calls = fcntl.flock, list[object]()

    def move_first(*arguments: Any) -> None:
        if not calls:
            calls.append(arguments)
            os.rename(folder, moved)
            if is_made_again:
                folder.mkdir()
                (folder / LOCK_NAME).touch()
        flock(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", move_first)
        with try_lock_folder(folder) as is_locked:
            assert calls and not is_locked
    with try_lock_folder(folder) as is_locked:
        assert is_locked


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root can write everywhere")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError), try_lock_folder(tmp_path):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_file_lock_waits_for_its_turn(tmp_path: Path) -> None:
    path, order = tmp_path / "folder" / "lock", list[str]()

    def wait() -> None:
        with lock_file(path):
            order.append("second")

    with lock_file(path):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(timeout=0.05)
        order.append("first")
    thread.join(timeout=60)
    assert order == ["first", "second"] and path.stat().st_size == 0
