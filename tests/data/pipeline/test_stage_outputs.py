"""Stage outputs: atomic writes, and the removal of temporary files."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fledge.data.pipeline.stage_outputs import load_array, remove_temporary_files, remove_work_folder, save_array


def test_arrays_are_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_array(tmp_path / "a.npy", np.arange(5))

    def raise_disk_full(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device.*a\.npy"):
        patch.setattr(np, "save", raise_disk_full)
        save_array(tmp_path / "a.npy", np.arange(6))
    assert load_array(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("array", [np.empty(0, np.uint64), np.zeros(3, np.dtype([("tokens", "<i4")]))])
def test_arrays_are_loaded_as_they_were_saved(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    save_array(tmp_path / "a.npy", array)
    loaded = load_array(tmp_path / "a.npy")
    assert loaded.dtype == array.dtype and np.array_equal(loaded, array)


def test_only_temporary_files_of_the_build_are_removed(tmp_path: Path) -> None:
    """They are removed at any depth in the work folder, but next to it only for the names of results."""
    work = tmp_path / "work"
    temporary = ["work/read/.1.abc.part/text.bin", "work/.x.part", ".a.bin.abc.part", ".work.abc.part/read/1"]
    kept = ["work/read/1/text.bin", "a.bin", ".b.bin.abc.part", "notes/.a.bin.abc.part"]
    for name in [*temporary, *kept]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_temporary_files(work, ["a.bin"])
    remaining = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(remaining) == sorted(kept)
    remove_work_folder(work)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.bin.abc.part", "a.bin", "notes"]
