"""Several processes give what one gives: ddp and fsdp, also with accumulation and carried state, also resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from processes import finish, lines, weights

from fledge.core.errors import ConfigError
from fledge.data.batches import Batch
from fledge.train.distributed import Distributed, join
from fledge.train.recipe import Recipe
from fledge.train.run import run

# With a tiny eps, Adam makes a whole step out of the rounding of a gradient that is almost zero.
SETTINGS: dict[str, Any] = {"window": 8, "tbptt_windows": 1, "eps": 1e-6}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    finish(folder, **SETTINGS)
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    ours, theirs = lines(folder), lines(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=MODEL_TOLERANCE)
    for name, tensor in weights(other).items():
        # Adam divides a gradient by its own size, so it magnifies the rounding of gradients near zero. 3e-6 was
        # measured.
        assert_close_relative(weights(folder)[name], tensor, 5e-5, name)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one_and_resume(mode: str, alone: Path, tmp_path: Path) -> None:
    finish(tmp_path / "whole", 2, parallel=mode, **SETTINGS)
    assert_same_run(tmp_path / "whole", alone)
    finish(tmp_path / "cut", 2, parallel=mode, stop_after=6, **SETTINGS)
    assert lines(tmp_path / "cut")[-1]["step"] == 6
    finish(tmp_path / "cut", 2, parallel=mode, **SETTINGS)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], tensor), name


def test_rows_are_distributed_in_turn() -> None:
    batch = Batch(torch.arange(12).view(6, 2), loss_mask=torch.arange(6).view(6, 1) > 2)
    first, second = (Distributed(rank, 2, "ddp").shard(batch) for rank in (0, 1))
    assert first.idx[:, 0].tolist() == [0, 4, 8] and second.idx[:, 0].tolist() == [2, 6, 10]
    assert (first.targets, second.targets) == (1, 2)
    with pytest.raises(ConfigError, match="6 rows, which 4 processes cannot share evenly"):
        Distributed(0, 4, "ddp").shard(batch)


def test_micro_must_be_a_multiple_of_the_processes(tmp_path: Path) -> None:
    words = "micro_batch_size is 3, but 2 processes share it; use a multiple of 2 that divides batch = 6"
    with pytest.raises(ConfigError, match=words):
        run(Recipe(batch=6, micro_batch_size=3), "no store", tmp_path, distributed=Distributed(0, 2, "ddp"))


def test_single_process_needs_no_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with join() as distributed:
        assert (
            distributed == Distributed()
            and distributed.is_main
            and distributed.total(2.5) == 2.5
            and distributed.largest(3) == 3
        )
    with pytest.raises(ConfigError, match="choose from ddp, fsdp"), join("tensor"):
        pass
    with pytest.raises(ConfigError, match="start them with `torchrun"), join("fsdp"):
        pass
