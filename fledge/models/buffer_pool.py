"""Tensors that reuse the memory of freed tensors.

New memory from the system costs a page fault for every 4 KiB and is filled with zeros. For the states of a large batch
this takes longer than computing them. The pool takes a block back when the last tensor in it is freed. A state stays a
value: memory is never overwritten while a tensor uses it.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

MIN_POOLED = 1 << 18  # floats; smaller memory is cached by the allocator itself
MAX_FREE_BLOCKS = 6  # of any size; a step frees the tensors of a state and its logits
ALIGNMENT = 16  # floats; blocks start on a cache line


class BufferPool:
    """A short list of free blocks; the oldest is dropped first. Threads may share it.

    It has no lock, because the garbage collector may return a block in the middle of any of these lines. The operations
    of a deque are atomic.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=MAX_FREE_BLOCKS)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialized float32 tensor on the CPU."""
        count = math.prod(shape)
        if count < MIN_POOLED:
            return torch.empty(shape, dtype=torch.float32)
        block = self._take(count)
        if block is None:
            raw = np.empty(count + ALIGNMENT, dtype=np.float32)
            first = -raw.ctypes.data % (4 * ALIGNMENT) // 4
            block = raw[first : first + count]
        # The tensor's storage and all its views reference `view`. When it is freed, the block returns to the list.
        view = block[:]
        weakref.finalize(view, self._free.append, block).atexit = False
        return torch.from_numpy(view).view(shape)

    def _take(self, count: int) -> np.ndarray | None:
        for _ in range(len(self._free)):
            try:
                block = self._free.popleft()
            except IndexError:  # another thread took the last block
                return None
            if block.size == count:
                return block
            self._free.append(block)
        return None
