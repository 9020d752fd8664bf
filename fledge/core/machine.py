"""Facts about this machine and process: hardware, versions, commit and memory, as plain values.

Nothing here identifies a person or a host. torch is imported inside the functions, so importing this module is cheap.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fledge import __version__
from fledge.core.device import count_usable_cores

REPOSITORY = Path(__file__).resolve().parents[2]
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss

# Instruction sets that speed up matrix products on a CPU.
CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("neon", "asimd", "asimddp", "bf16", "i8mm", "sve"),
)


def machine_facts() -> dict[str, Any]:
    """Return CPU, cores, memory, versions, commit and load average as plain JSON."""
    import torch

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
    """Return the name that the processor reports."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read_text(Path("/proc/cpuinfo")), re.M)
    if match:
        return match[1].strip()
    if sys.platform == "darwin":
        return _command_output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Return the capability that torch uses, then the CPU_FEATURES of the processor (Linux only)."""
    import torch

    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read_text(Path("/proc/cpuinfo")), re.M)
    flags = set(match[1].split()) if match else set()
    return [torch.backends.cpu.get_cpu_capability(), *(name for name in CPU_FEATURES if name in flags)]


def memory_bytes() -> int | None:
    """Return the RAM of this machine, or None if the platform does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def free_memory_bytes() -> int | None:
    """Return the RAM that is still available to programs (Linux only)."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB", _read_text(Path("/proc/meminfo")), re.M)
    return int(match[1]) * 1024 if match else None


def resident_memory(pid: int | str = "self") -> int | None:
    """Return the bytes of RAM that a process uses now (Linux only)."""
    return _process_memory("VmRSS", pid)


def peak_memory() -> int | None:
    """Return the peak RAM of this process in bytes, or None if the platform does not report it.

    On Linux, `ru_maxrss` also counts the memory of the parent at the fork. VmHWM counts this process only.
    """
    peak = _process_memory("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def load_average() -> list[float] | None:
    """Return the number of runnable processes over the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def gpus() -> list[str]:
    """Return the name and memory of each GPU that torch sees."""
    import torch

    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        names.append("Apple GPU (mps)")
    return names


def commit() -> str | None:
    """Return the commit of this checkout, with "+" if tracked files were changed, or None outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None
    head = _command_output("git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    changes = _command_output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if changes else head


def package_version(name: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _process_memory(field: str, pid: int | str = "self") -> int | None:
    """A field of /proc/PID/status that is in kB."""
    match = re.search(rf"^{field}:\s*(\d+) kB", _read_text(Path(f"/proc/{pid}/status")), re.M)
    return int(match[1]) * 1024 if match else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _command_output(*command: str) -> str:
    """The output of a command, or "" if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
