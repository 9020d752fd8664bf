"""Pieces of unfinished work: whole or not there, and nothing else is swept up."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fledge.data.pipeline.stage_outputs import discard, load_array, save_array, sweep


def test_an_array_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_array(tmp_path / "a.npy", np.arange(5))

    def full(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device.*a\.npy"):
        patch.setattr(np, "save", full)
        save_array(tmp_path / "a.npy", np.arange(6))
    assert load_array(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("array", [np.empty(0, np.uint64), np.zeros(3, np.dtype([("tokens", "<i4")]))])
def test_arrays_come_back(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    save_array(tmp_path / "a.npy", array)
    found = load_array(tmp_path / "a.npy")
    assert found.dtype == array.dtype and np.array_equal(found, array)


def test_sweeping(tmp_path: Path) -> None:
    """Half done files and folders go, in the work folder at any depth, beside it by the names of results only."""
    work = tmp_path / "work"
    gone = ["work/read/.1.abc.part/text.bin", "work/.x.part", ".a.bin.abc.part", ".work.abc.part/read/1"]
    stay = ["work/read/1/text.bin", "a.bin", ".b.bin.abc.part", "notes/.a.bin.abc.part"]
    for name in [*gone, *stay]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sweep(work, ["a.bin"])
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(stay)
    discard(work)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.bin.abc.part", "a.bin", "notes"]
