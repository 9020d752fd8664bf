"""Everything that `fledge doctor` reports, as values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fledge.checkpoint import verify
from fledge.core.device import choose_device
from fledge.core.errors import FledgeError
from fledge.core.files import get_asset_path, hash_file
from fledge.core.machine import free_memory_bytes, machine_facts
from fledge.diagnostics.environment import EXTRAS, Extra
from fledge.diagnostics.selfcheck import KernelCheck, check_kernels
from fledge.engine.llm.loading import BUNDLED
from fledge.kernels import explain
from fledge.kernels.dispatch import BackendChoice


@dataclass(frozen=True)
class BundledModel:
    """The model that ships with the package. `problem` is empty if the file is valid."""

    path: Path
    sha256: str | None
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What is installed, which kernel runs in which situation, and what is wrong."""

    machine: dict[str, Any]
    threads: int
    kernels: tuple[BackendChoice, ...]
    checks: tuple[KernelCheck, ...]
    bundled: BundledModel
    extras: tuple[Extra, ...]

    @property
    def healthy(self) -> bool:
        """Whether every self-check passed and the bundled model is usable."""
        return all(check.passed for check in self.checks) and not self.bundled.problem

    def facts(self) -> list[tuple[str, str]]:
        """Return the label and the text of each fact about the machine and the installation."""
        machine = self.machine
        total, free = machine["memory_bytes"], free_memory_bytes()
        memory = f"{total / 2**30:.1f} GiB" if total else "unknown"
        device, reason = choose_device()
        return [
            ("fledge", machine["fledge"] + (f", commit {machine['commit']}" if machine["commit"] else "")),
            ("python", machine["python"]),
            ("torch", f"{machine['torch']}, {self.threads} threads"),
            ("system", machine["system"]),
            ("cpu", f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores usable"),
            ("cpu features", ", ".join(machine["cpu_features"])),
            ("memory", memory + (f", {free / 2**30:.1f} GiB free" if free else "")),
            ("gpu", "; ".join(machine["gpus"]) or "none"),
            ("default device", f"{device} ({reason})"),
        ]


def diagnose() -> Diagnosis:
    """Check everything. Nothing is changed."""
    return Diagnosis(
        machine=machine_facts(),
        threads=torch.get_num_threads(),
        kernels=tuple(explain()),
        checks=tuple(check_kernels()),
        bundled=_check_bundled_model(),
        extras=EXTRAS,
    )


def _check_bundled_model() -> BundledModel:
    path = get_asset_path(f"{BUNDLED}.safetensors")
    if not path.is_file():
        return BundledModel(path, None, "missing; install Fledge again, or pass another checkpoint with --model")
    try:
        verify(path)
    except FledgeError as error:
        return BundledModel(path, hash_file(path), str(error))
    return BundledModel(path, hash_file(path))
