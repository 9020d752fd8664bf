"""The device that a model runs on and the dtype of its weights, each with a reason in words; the usable cores.

torch is imported inside the functions, so that this module is fast to import.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from fledge.core.errors import UsageError

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}

SMALL_MODEL = 50_000_000
"""Below this number of parameters, a model on a CPU runs in float32: the memory is small and the result exact."""


def choose_device(name: str | None = None) -> tuple[torch.device, str]:
    """Return the device called `name` ("cpu", "cuda", "cuda:1", "mps"), or the best one for None, and the reason.

    Raises UsageError for an unknown name and for a device that this machine does not have.
    """
    import torch

    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda"), f"a GPU is present: {torch.cuda.get_device_name()}"
        return torch.device("cpu"), "no CUDA GPU is present"
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name)
    if match is None:
        raise UsageError(f"device {name!r} is unknown; choose cpu, cuda, cuda:0 (or another number) or mps")
    kind, number = match[1], int(match[2] or 0)
    if kind == "cuda" and number >= torch.cuda.device_count():
        raise UsageError(
            f"device {name!r} is not available: torch sees {torch.cuda.device_count()} CUDA devices; try cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' is not available: torch sees no Apple GPU; try cpu")
    return torch.device(name), "requested"


def choose_dtype(name: str | None, device: torch.device, parameters: int) -> tuple[torch.dtype | None, str]:
    """Return the dtype called `name`, or the default for a model of this many parameters, and the reason.

    None means the dtype of the file. State, decay and norms are always float32.
    Raises UsageError for an unknown name.
    """
    import torch

    if name is not None:
        if name not in DTYPE_NAMES:
            raise UsageError(f"dtype {name!r} is unknown; choose {', '.join(DTYPE_NAMES)}")
        dtype = getattr(torch, DTYPE_NAMES[name])
        assert isinstance(dtype, torch.dtype)
        return dtype, "requested"
    if device.type == "cpu" and parameters < SMALL_MODEL:
        return torch.float32, f"on a CPU, a model below {SMALL_MODEL // 1_000_000} million parameters runs in float32"
    return None, "as in the file"


def count_usable_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
