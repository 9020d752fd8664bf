"""Runs that are killed at any moment lose nothing but time, and rows of any length take the memory of a window."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import torch
from processes import ENVIRONMENT, command, finish, lines, weights

KILLS = 3
SETTINGS = {"steps": 60, "save_every": 2, "validate_every": 7, "log_every": 3, "n_embd": 64}


def test_repeatedly_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    finish(tmp_path / "whole", **SETTINGS)
    cut, draw, kills = tmp_path / "cut", random.Random(5), 0
    while True:
        process = subprocess.Popen(command(cut, **SETTINGS), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        before = steps_written(cut)
        while process.poll() is None and steps_written(cut) == before:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        if process.poll() is None and kills < KILLS:
            kills += 1
            process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
    assert kills == KILLS, "the run was over before it could be killed"
    assert lines(cut) == lines(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(cut)[name], tensor), name
    assert [path.name for path in cut.glob(".*.part")] == []


def steps_written(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_memory_does_not_depend_on_the_length_of_a_row(tmp_path: Path) -> None:
    shared = {
        "batch": 1,
        "micro_batch_size": 1,
        "steps": 2,
        "warmup_steps": 1,
        "window": 512,
        "tbptt_windows": 2,
        "n_embd": 64,
    }
    short = finish(tmp_path / "short", length=2048, **shared)
    long = finish(tmp_path / "long", length=32_768, **shared)
    assert long < 1.1 * short
