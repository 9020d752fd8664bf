"""Starting `driver.py`: alone, under torchrun, or to be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

DRIVER = Path(__file__).with_name("driver.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(DRIVER.parents[2]), "OMP_NUM_THREADS": "1"}


def command(folder: Path, processes: int = 0, **settings: object) -> list[str]:
    """The command line; processes 0: without torchrun."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    return [sys.executable, *start, str(DRIVER), str(folder), json.dumps(settings)]


def finish(folder: Path, processes: int = 0, **settings: object) -> int:
    """Run to the end; returns the peak memory that was printed, in the system's unit."""
    done = subprocess.run(
        command(folder, processes, **settings), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def lines(folder: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says, but for the speed."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in found]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the last step."""
    found: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return found
