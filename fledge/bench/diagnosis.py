"""Everything `fledge doctor` reports, as values. Printing is the command's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fledge.bench.environment import EXTRAS, Extra, free_memory_bytes, machine_facts
from fledge.bench.selfcheck import Check, check_kernels
from fledge.checkpoint import verify
from fledge.core.device import choose_device
from fledge.core.errors import FledgeError
from fledge.core.files import get_asset_path, hash_file
from fledge.engine.llm.loading import BUNDLED
from fledge.kernels import explain
from fledge.kernels.dispatch import BackendChoice


@dataclass(frozen=True)
class Bundled:
    """The model of the package; `problem` is empty where it is there and sound."""

    path: Path
    sha256: str | None
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What is installed, what runs where, and what is wrong."""

    machine: dict[str, Any]
    threads: int
    kernels: tuple[BackendChoice, ...]
    checks: tuple[Check, ...]
    bundled: Bundled
    extras: tuple[Extra, ...]

    @property
    def healthy(self) -> bool:
        """Whether every self-check passed and the bundled model can be used."""
        return all(check.passed for check in self.checks) and not self.bundled.problem

    def facts(self) -> list[tuple[str, str]]:
        """Label and text of each fact about machine and installation."""
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
            ("memory", memory + (f", {free / 2**30:.1f} GiB of it free" if free else "")),
            ("gpu", "; ".join(machine["gpus"]) or "none that torch sees"),
            ("models run on", f"{device} ({reason}), unless --device says otherwise"),
        ]


def diagnose() -> Diagnosis:
    """Look at everything; nothing is changed."""
    return Diagnosis(
        machine=machine_facts(),
        threads=torch.get_num_threads(),
        kernels=tuple(explain()),
        checks=tuple(check_kernels()),
        bundled=_bundled(),
        extras=EXTRAS,
    )


def _bundled() -> Bundled:
    path = get_asset_path(f"{BUNDLED}.safetensors")
    if not path.is_file():
        return Bundled(path, None, "missing; install Fledge again, or give --model a checkpoint of your own")
    try:
        verify(path)
    except FledgeError as error:
        return Bundled(path, hash_file(path), str(error))
    return Bundled(path, hash_file(path))
