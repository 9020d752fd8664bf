"""A token store: the ids of a corpus in one flat uint16 file, documents separated by id 0."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fledge.core.errors import UsageError
from fledge.core.files import atomic_path

SEPARATOR = 0  # the end-of-text id of World and of every pruned vocabulary
STORED = np.dtype("<u2")
LARGEST = 65535


def write_tokens(path: Path, documents: Iterable[list[int]]) -> int:
    """Write documents one after the other, each followed by id 0. Returns the number of ids written."""
    total = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for ids in documents:
            if max(ids, default=0) > LARGEST:
                raise UsageError(f"token id {max(ids)} does not fit a token store, whose ids go up to {LARGEST}")
            chunk = np.asarray([*ids, SEPARATOR], dtype=STORED)
            file.write(chunk.tobytes())
            total += len(chunk)
    return total


def open_tokens(path: Path) -> npt.NDArray[np.uint16]:
    """The ids of a store, memory-mapped."""
    if not path.is_file() or path.stat().st_size < 4 or path.stat().st_size % 2:
        raise UsageError(f"{path} is not a token store with at least two tokens; run the prepare step first")
    return np.memmap(path, dtype=STORED, mode="r")
