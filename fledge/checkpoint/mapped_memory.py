"""Giving back the memory of weights that were read from a mapped file and are needed no more.

All tensors of a file share one mapping, so dropping one of them frees nothing: what was read stays resident until the
last is dropped. Here: the one system call that lets go of a part. Not here: the mapping itself.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor


def release_pages(tensor: Tensor) -> None:
    """Let go of the whole pages under a CPU tensor's values, which nobody may read again through memory of their own.

    Pages of a mapped file come back from the file when they are touched; those of plain memory come back as zeros. A
    hint, on Linux only: elsewhere, and where the system refuses, nothing happens.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    first = tensor.data_ptr()
    end = (first + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
