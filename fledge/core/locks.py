"""Locks between processes. They end with the process that holds them, however it ends; the lock files stay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = "lock"
"""Name of the lock file in a locked folder."""


@contextmanager
def try_lock_folder(folder: Path) -> Iterator[bool]:
    """Make and lock a folder without waiting. Yields False if another process has locked it.

    The holder may move the folder away within the block; the next process then makes a new folder. Raises OSError if
    the lock file cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        path.touch()
        before = path.stat()
        lock.acquire()
    except (Timeout, FileNotFoundError):
        yield False
        return
    try:
        # The previous holder may have moved the folder away after the file was opened here and before it was locked.
        yield _is_same_file(path, before)
    finally:
        lock.release()


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Lock a file, which is made empty if it does not exist; waits until no other process holds its lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, thread_local=False).acquire(poll_interval=0.005):
        yield


def _is_same_file(path: Path, expected: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), expected)
    except FileNotFoundError:
        return False
