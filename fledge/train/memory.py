"""Keep freed memory in the process while training on a CPU.

Every step frees and allocates the same tensors. By default, glibc returns large blocks to the system immediately. The
page faults of the next allocation took about a quarter of a step's time in a measurement. With other C libraries, these
functions do nothing.

Validation reads texts of all lengths. The memory that it frees has other sizes than a step needs, so keeping it would
let a long run grow by gigabytes. Therefore all free memory is returned once after each validation.
"""

from __future__ import annotations

import ctypes
import platform

# The numbers of parameters of mallopt(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Configure the C library not to return memory to the system. Returns whether it succeeded."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: (1 << 31) - 1, TOP_PAD: 1 << 26}
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())


def return_freed_memory() -> bool:
    """Return all free memory to the system. Returns whether the C library supports this."""
    if platform.libc_ver()[0] != "glibc":
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True
