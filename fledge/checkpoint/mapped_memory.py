"""Release the memory of weights that were read from a mapped file and are no longer needed.

All tensors of a file share one mapping. Deleting one of them therefore frees nothing: its pages stay resident until
the last tensor is deleted.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor


def release_pages(tensor: Tensor) -> None:
    """Release the whole pages under the values of a CPU tensor, whose values must not be used afterwards.

    Pages of a mapped file are read again from the file when accessed; pages of other memory become zeros. This is a
    hint for Linux; on other systems, and if the kernel refuses, it has no effect.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    first = tensor.data_ptr()
    end = (first + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
