"""Reading the metadata of a distributed checkpoint executes no code."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.planner import ReadItem

from fledge.core.errors import CheckpointError
from fledge.train.safe_checkpoint import METADATA_FILE, SafePlanner, SafeReader


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def test_metadata_that_refers_to_a_function_is_rejected(tmp_path: Path) -> None:
    (tmp_path / METADATA_FILE).write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    with pytest.raises(CheckpointError, match=r"refers to (posix|nt)\.mkdir, which is not allowed"):
        SafeReader(tmp_path).read_metadata()
    assert not (tmp_path / "made").exists()


def test_metadata_of_another_type_is_rejected(tmp_path: Path) -> None:
    (tmp_path / METADATA_FILE).write_bytes(pickle.dumps([torch.float32]))
    with pytest.raises(CheckpointError, match="does not contain the metadata"):
        SafeReader(tmp_path).read_metadata()


def test_values_run_nothing(tmp_path: Path) -> None:
    held = io.BytesIO()
    torch.save(Evil(tmp_path / "made"), held)
    held.seek(0)
    item = ReadItem(None, None, None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(pickle.UnpicklingError):
        SafePlanner().load_bytes(item, held)
    assert not (tmp_path / "made").exists()
