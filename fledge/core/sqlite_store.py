"""Base class of stores that keep files in a folder and their records in an SQLite index."""

from __future__ import annotations

import os
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fledge.core.errors import UsageError
from fledge.core.files import atomic_path
from fledge.core.locks import try_lock_folder


@dataclass(frozen=True)
class IndexSchema:
    """The tables of an index."""

    statements: tuple[str, ...]  # CREATE TABLE IF NOT EXISTS ..., CREATE INDEX IF NOT EXISTS ...
    version: int  # an index with another version cannot be opened
    is_durable: bool  # whether a commit waits for the disk; otherwise a power failure may lose the last commits

    def connect(self, path: Path) -> sqlite3.Connection:
        """Open or make an index, for use by several threads, one at a time.

        Raises sqlite3.Error if the index is damaged or has another version.
        """
        connection = sqlite3.connect(path, check_same_thread=False)
        with ExitStack() as stack:
            stack.enter_context(closing(connection))
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'FULL' if self.is_durable else 'NORMAL'}")
            (check,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if check != "ok" or version not in (0, self.version):
                raise sqlite3.DatabaseError(check if check != "ok" else f"version {version}, not {self.version}")
            with connection:
                for statement in self.statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {self.version}")
            stack.pop_all()
        return connection


class SqliteStore(ABC):
    """An open folder of files with an SQLite index, used by one process at a time.

        lock       held while the store is open
        <index>    the SQLite index
        states/    the files

    Subclasses write a file before they commit its row, and delete a row before its file. A crash therefore leaves at
    most files without rows, which `_delete_orphans` removes when the store is opened again.
    """

    INDEX: ClassVar[str]
    """File name of the index."""

    SCHEMA: ClassVar[IndexSchema]

    OWN_FILES: ClassVar[re.Pattern[str]]
    """Matches the names of files that this store may delete, temporary files of `atomic_path` included."""

    CONTENT: ClassVar[str]
    """What the files are, in messages."""

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises UsageError if another process has it open, OSError or sqlite3.Error if it fails."""
        self.folder, self._files = folder, folder / "states"
        with ExitStack() as stack:
            if not stack.enter_context(try_lock_folder(folder)):
                raise UsageError(
                    f"{folder}: another process uses this folder for its {self.CONTENT}; give each process its own"
                )
            self._files.mkdir(exist_ok=True)
            self._index = stack.enter_context(closing(self._connect()))
            self._load()
            self._open = stack.pop_all()

    def close(self) -> None:
        """Close the index and release the folder."""
        self._open.close()

    def _connect(self) -> sqlite3.Connection:
        """The index; see IndexSchema.connect for the errors."""
        return self.SCHEMA.connect(self.folder / self.INDEX)

    @abstractmethod
    def _load(self) -> None:
        """Read what the store needs of its index, and delete what a crash has left."""

    def _write_file(self, name: str, data: bytes) -> None:
        """Write a file completely or not at all, and wait until it is on the disk."""
        with atomic_path(self._files / name) as temporary:
            temporary.write_bytes(data)

    def _delete_files(self, names: Iterable[str]) -> None:
        for name in names:
            (self._files / name).unlink(missing_ok=True)

    def _own_files(self) -> dict[str, int]:
        """The name and size of each file that this store may delete."""
        with os.scandir(self._files) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if self.OWN_FILES.fullmatch(entry.name)}
