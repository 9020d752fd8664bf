"""Tensors whose memory is used again once nobody holds them.

Fresh memory from the system costs a page fault for every 4 KiB and arrives as zeros: for the states of a large batch
that is more time than computing them. Here a block goes back to a short list when the last tensor that lies in it has
gone, which is exactly when it would have been freed. A state stays a value: nothing is ever written that somebody can
still see. Not here: what the tensors are for.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 18  # floats; below this the allocator keeps memory by itself
KEPT = 6  # unused blocks, of whatever size: a step leaves the tensors of a state and its scores behind
BORDER = 16  # floats; blocks begin on a cache line


class BufferPool:
    """A short list of unused blocks, the oldest of which gives way. Safe to share by threads.

    No lock: a block may come back while the garbage collector runs in the middle of any of these lines. A deque's own
    steps are whole.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=KEPT)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised float32 tensor on the CPU."""
        count = math.prod(shape)
        if count < SMALL:
            return torch.empty(shape, dtype=torch.float32)
        block = self._take(count)
        if block is None:
            raw = np.empty(count + BORDER, dtype=np.float32)
            first = -raw.ctypes.data % (4 * BORDER) // 4
            block = raw[first : first + count]
        # The tensor's storage holds `lent`, whatever views are made of it; when that goes, the block comes back.
        lent = block[:]
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(lent).view(shape)

    def _take(self, count: int) -> np.ndarray | None:
        for _ in range(len(self._free)):
            try:
                block = self._free.popleft()
            except IndexError:  # another thread was faster
                return None
            if block.size == count:
                return block
            self._free.append(block)
        return None
