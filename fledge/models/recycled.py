"""Tensors whose memory is used again once nobody holds them.

Fresh memory from the system costs a page fault for every 4 KiB and arrives as zeros: for the states of a large batch
that is more time than computing them. Here a block goes back to a short list when the last tensor that lies in it has
gone, which is exactly when it would have been freed. A state stays a value: nothing is ever written that somebody can
still see. Not here: what the tensors are for.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 18  # floats; below this the allocator keeps memory by itself
KEPT = 2  # unused blocks of one size


class Recycler:
    """A short list of unused blocks for each size. Safe to share by threads."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised float32 tensor on the CPU."""
        count = math.prod(shape)
        if count < SMALL:
            return torch.empty(shape)
        with self._lock:
            block = self._free[count].pop() if self._free[count] else None
        if block is None:
            block = np.empty(count, dtype=np.float32)
        # The tensor's storage holds `lent`, whatever views are made of it; when that goes, the block comes back.
        lent = block[:]
        weakref.finalize(lent, self._take_back, block).atexit = False
        return torch.from_numpy(lent).view(shape)

    def _take_back(self, block: np.ndarray) -> None:
        with self._lock:
            if len(self._free[block.size]) < KEPT:
                self._free[block.size].append(block)
