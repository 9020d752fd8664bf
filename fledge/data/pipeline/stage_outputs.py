"""The outputs of the stages in the work folder. Each is written atomically, so a killed build resumes from them.

The folder name of a stage contains a key: a hash of the settings of the stage and of the keys of the earlier stages.
After a change of a setting, a build therefore reuses the stages that do not depend on it.
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

TEMPORARY_SUFFIX = ".part"
WORK_VERSION = 2  # version of the work folder; outputs of another version are not reused


@dataclass(frozen=True)
class StageContext:
    """The arguments that all tasks of a build share. Sent to other processes and machines."""

    config: BuildConfig
    work: Path
    keys: dict[str, str] = field(default_factory=dict)

    def folder(self, stage: str) -> Path:
        """The folder of the outputs of a stage."""
        return self.work / f"{stage}-{self.keys[stage]}"

    def list_outputs(self, stage: str) -> list[Path]:
        """The finished outputs of a stage, in order."""
        return list_finished(self.folder(stage))

    def with_stage(self, stage: str, *settings: Any) -> StageContext:
        """This context with one more stage, which depends on `settings` and on all earlier stages."""
        text = json.dumps([WORK_VERSION, stage, *settings, sorted(self.keys.items())], sort_keys=True)
        return StageContext(
            self.config, self.work, {**self.keys, stage: hashlib.sha256(text.encode()).hexdigest()[:12]}
        )


def list_finished(folder: Path) -> list[Path]:
    """The finished outputs in the folder of a stage, in order."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `target` when the block ends without an error.

    If `target` exists by then, it is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=TEMPORARY_SUFFIX, dir=target.parent))
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


def remove_temporary_files(work: Path, results: Iterable[str]) -> None:
    """Remove the temporary files of killed builds: those in the work folder, and those of `results` next to it.

    results: names of files in the store's folder. Its other files may belong to the user and are kept.

    A worker that is still running after its build was killed may be writing one of these files. Each is therefore
    renamed before it is removed, so that the worker cannot turn an incomplete folder into a finished output.
    """
    siblings = [path for name in (work.name, *results) for path in work.parent.glob(f".{name}.*{TEMPORARY_SUFFIX}")]
    for path in [*work.rglob(f".*{TEMPORARY_SUFFIX}"), *siblings]:
        target = path.name[1:].removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0]
        with suppress(FileNotFoundError):
            renamed = _rename_away(path, target)
            if renamed.is_dir():
                shutil.rmtree(renamed, ignore_errors=True)
            else:
                renamed.unlink(missing_ok=True)


def remove_work_folder(work: Path) -> None:
    """Remove a work folder. It is renamed first, because another build may create a new one during the removal."""
    with suppress(OSError):
        work = _rename_away(work, work.name)
    shutil.rmtree(work, ignore_errors=True)


def _rename_away(path: Path, target: str) -> Path:
    """Rename to a temporary name that `remove_temporary_files` finds. target: the final name of the path."""
    renamed = path.with_name(f".{target}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    os.rename(path, renamed)
    return renamed


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array for `load_array` atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path) -> npt.NDArray[Any]:
    """A memory-mapped array written by `save_array`."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    assert isinstance(array, np.ndarray)
    return array
