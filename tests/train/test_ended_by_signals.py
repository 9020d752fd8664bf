"""SIGINT and SIGTERM end a run after its step: one line, the customary exit code, and the checkpoint of that step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ENVIRONMENT

from fledge.data.binidx import open_binidx_writer

SETTINGS = {
    "vocab_size": 40,
    "n_layer": 1,
    "n_embd": 64,
    "length": 16,
    "batch": 4,
    "micro_batch_size": 2,
    "dtype": "float32",
}
ENDLESS = {"steps": 1_000_000, "save_every": 1_000_000, "validate_every": 1_000_000, "log_every": 1}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A pair of files as RWKV-LM's tools write them."""
    with open_binidx_writer(tmp_path / "pair", np.uint16) as writer:
        writer.add(np.tile(np.arange(1, 38), 60))
    return tmp_path / "pair"


def stopped(data: Path, folder: Path, *start: str, more: tuple[str, ...] = (), stop: Callable[[int], None]) -> str:
    """Start a run, let `stop` end the process of this number after a few steps; "code" and what it said."""
    changes = [word for name, value in {**SETTINGS, **ENDLESS}.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, *start, "-m", "fledge", "train", "tiny", "--data", str(data), "--to", str(folder)]
    with subprocess.Popen(
        [*command, *changes, *more], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stderr is not None
        said = []
        for line in run.stderr:
            said.append(line)
            if line.startswith("step ") and sum(line.startswith("step ") for line in said) == 3:
                stop(run.pid)
        return f"code {run.wait()}\n" + "".join(line for line in said if not line.startswith("step "))


def saved_step(said: str) -> int:
    (step,) = re.findall(r"saved at step (\d+); the same command continues from there\n", said)
    return int(step)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that can be noted")
def test_stopped_process_saves_its_step_and_continues_from_it(data: Path, tmp_path: Path) -> None:
    said = stopped(data, tmp_path / "run", stop=lambda pid: os.kill(pid, signal.SIGINT))
    step = saved_step(said)
    assert said == f"code 130\nsaved at step {step}; the same command continues from there\n"
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == step >= 3
    said = stopped(data, tmp_path / "run", stop=lambda pid: os.kill(pid, signal.SIGTERM))
    later = saved_step(said)
    first, second, third = said.splitlines()
    assert (first, second) == ("code 143", f"continues from step {step}") and str(later) in third
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == later > step


@pytest.mark.skipif(os.name == "nt", reason="torchrun's processes are stopped in other ways there")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_several_processes_agree_on_the_step(data: Path, tmp_path: Path, mode: str) -> None:
    def stop(pid: int) -> None:
        if mode == "ddp":
            os.killpg(pid, signal.SIGINT)  # as a terminal does
        else:
            os.kill(pid, signal.SIGTERM)  # torchrun's own process, which passes it on

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    said = stopped(data, tmp_path / "run", *torchrun, more=("--parallel", mode), stop=stop)
    step = saved_step(said)
    if mode == "ddp":
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == step >= 3
    else:
        (whole,) = (tmp_path / "run" / "last").glob("step-*/whole")
        assert torch.load(whole, weights_only=True)["step"] == step >= 3
    assert "view tensor" not in said and "Fledge" not in said, said
