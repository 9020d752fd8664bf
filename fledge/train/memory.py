"""Keep freed memory in the process while training on a CPU.

Every step frees and asks for the same tensors. By default glibc hands large blocks back to the system at once, and
faulting the pages in again took about a quarter of a step's time where this was measured. Elsewhere than on glibc
nothing happens.

Validation reads texts of every length, and the memory it frees is between blocks that no step uses again: kept, it
would let a long run grow by gigabytes. So after it everything free goes back, once.
"""

from __future__ import annotations

import ctypes
import platform

# Numbers of mallopt(3)'s parameters.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell the C library not to return memory to the system. True where it understood."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: (1 << 31) - 1, TOP_PAD: 1 << 26}
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())


def return_freed_memory() -> bool:
    """Give the system back what is free now. True where the C library knows how."""
    if platform.libc_ver()[0] != "glibc":
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True
