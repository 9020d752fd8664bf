"""What this machine and this installation are: the facts beside every figure, and what `fledge doctor` looks at.

Nothing that identifies a person or a host: no names, no paths but those of the package.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fledge import __version__
from fledge.core.device import count_usable_cores

REPOSITORY = Path(__file__).resolve().parents[2]

# Instruction sets that matrix products on a CPU gain from.
CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("neon", "asimd", "asimddp", "bf16", "i8mm", "sve"),
)


@dataclass(frozen=True)
class Extra:
    """An optional part of the installation: `pip install "fledge[name]"`."""

    name: str
    modules: tuple[str, ...]
    brings: str

    @property
    def command(self) -> str:
        """What installs it; empty where nothing is missing."""
        return f'pip install "fledge[{self.name}]"' if self.missing else ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules that are not installed."""
        return tuple(module for module in self.modules if find_spec(module) is None)


EXTRAS = (
    Extra("hub", ("huggingface_hub",), "models by their names on the Hugging Face hub"),
    Extra("bench", ("rwkv", "tokenizers", "matplotlib"), "`fledge bench`: other programs beside this one, and plots"),
    Extra("gguf", ("gguf",), "writing .gguf files, and reading those with K types"),
    Extra("train", ("matplotlib", "tensorboard"), "plots of training runs, and TensorBoard"),
    Extra(
        "data",
        ("rensa", "py3langid", "pyarrow", "zstandard"),
        "near copies, languages, Parquet and .zst in `fledge data`",
    ),
    Extra(
        "serve",
        ("fastapi", "uvicorn", "llguidance", "prometheus_client"),
        "`fledge serve`, and answers bound to a form",
    ),
    Extra("ray", ("ray",), "`fledge data build --ray` and `fledge serve --replicas`: many machines"),
)


def machine_facts() -> dict[str, Any]:
    """CPU, cores, memory, versions, commit and how busy the machine is, as plain JSON."""
    return {
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cores": os.cpu_count(),
        "usable_cores": count_usable_cores(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fledge": __version__,
        "commit": commit(),
        "load_average": load_average(),
    }


def cpu_model() -> str:
    """The name the processor gives itself."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.M)
    if found:
        return found[1].strip()
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Which of CPU_FEATURES the processor has (Linux), after what torch itself will use."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.M)
    flags = set(found[1].split()) if found else set()
    return [torch.backends.cpu.get_cpu_capability(), *(name for name in CPU_FEATURES if name in flags)]


def memory_bytes() -> int | None:
    """RAM of this machine, where the platform tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def free_memory_bytes() -> int | None:
    """RAM that programs can still have (Linux)."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(Path("/proc/meminfo")), re.M)
    return int(found[1]) * 1024 if found else None


def load_average() -> list[float] | None:
    """Processes that wanted to run in the last 1, 5 and 15 minutes: a benchmark on a busy machine is no benchmark."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def gpus() -> list[str]:
    """Name and memory of each GPU that torch sees."""
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("Apple GPU (mps)")
    return found


def commit() -> str | None:
    """The commit of the checkout this code lies in, with "+" where files differ from it; None outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None
    head = _output("git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    changed = _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if changed else head


def package_version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
