"""Pieces of unfinished work on disk: each appears whole or not at all, so a killed build continues from those it finds.

The folder of a stage carries a key in its name, made from all that decides what the stage gives: its settings and the
keys of the stages before. A changed setting therefore takes over the stages that it does not touch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.core.files import atomic_path
from fledge.data.pipeline.config import BuildConfig

PART = ".part"
LAYOUT = 2  # of everything in a work folder; another one takes nothing over


@dataclass(frozen=True)
class StageContext:
    """The arguments of every stage function besides its task. It is sent to other processes and machines."""

    config: BuildConfig
    work: Path
    keys: dict[str, str] = field(default_factory=dict)

    def folder(self, stage: str) -> Path:
        """Where a stage leaves its pieces."""
        return self.work / f"{stage}-{self.keys[stage]}"

    def pieces(self, stage: str) -> list[Path]:
        """The finished pieces of a stage, in order."""
        return finished(self.folder(stage))

    def with_stage(self, stage: str, *decisive: Any) -> StageContext:
        """With one more stage, which depends on `decisive` and on the stages named so far."""
        text = json.dumps([LAYOUT, stage, *decisive, sorted(self.keys.items())], sort_keys=True)
        return StageContext(
            self.config, self.work, {**self.keys, stage: hashlib.sha256(text.encode()).hexdigest()[:12]}
        )


def finished(folder: Path) -> list[Path]:
    """What is whole in a folder of pieces, in order."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well. If `target` is there by then, it stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PART, dir=target.parent))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(work: Path, results: Iterable[str]) -> None:
    """Remove what killed builds have left half done: in the work folder, and of the files `results` beside it.

    Everything else beside it may be the user's.

    A worker that outlived its build may still be writing one of these. Each is therefore renamed before it is emptied,
    so that the worker cannot make a finished piece of what is left.
    """
    beside = [path for name in (work.name, *results) for path in work.parent.glob(f".{name}.*{PART}")]
    for path in [*work.rglob(f".*{PART}"), *beside]:
        target = path.name[1:].removesuffix(PART).rpartition(".")[0]
        with suppress(FileNotFoundError):
            gone = _moved(path, target)
            if gone.is_dir():
                shutil.rmtree(gone, ignore_errors=True)
            else:
                gone.unlink(missing_ok=True)


def discard(work: Path) -> None:
    """Remove a work folder. It is moved away first: another build may begin a new one before this one is gone."""
    with suppress(OSError):
        work = _moved(work, work.name)
    shutil.rmtree(work, ignore_errors=True)


def _moved(path: Path, target: str) -> Path:
    """The path under another name, one that `sweep` finds by the name of what it was to become."""
    gone = path.with_name(f".{target}.{uuid.uuid4().hex}{PART}")
    os.rename(path, gone)
    return gone


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """An array that `load_array` maps, there whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path) -> npt.NDArray[Any]:
    """An array of `save_array`, mapped and not read."""
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    assert isinstance(found, np.ndarray)
    return found
