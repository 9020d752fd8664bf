"""Long documents that are read once: the state after a text is kept in a file, also while it is being read.

    path            the state after the whole text
    path + ".part"  the state after the first part of it, from an interrupted read

A later read of the same text loads its state from the file, or continues from the longest part. The file must match the
model and the text exactly: its metadata has the identity of the weights, and as `source` the SHA-256 of the initial
state and of all ids read since (four bytes each, little-endian).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fledge.core.errors import StateError, UsageError
from fledge.core.interrupts import Interrupted, catch_signals
from fledge.engine.generation import PREFILL_CHUNK, ProgressCallback, get_config, get_device, prefill_chunks
from fledge.engine.states.state_file import LoadedState, StateMetadata, read_state, write_state
from fledge.models.state import State

PARTIAL = ".part"
SAVE_INTERVAL = 64 * PREFILL_CHUNK
"""Tokens between two saves of a partial state, so that a killed process loses little."""

WriteErrorHandler = Callable[[OSError], None]


@dataclass(frozen=True, eq=False)
class ReadResult:
    """The state after a document."""

    state: State
    metadata: StateMetadata
    new_tokens: int  # tokens that were read now; the file already covered all others


def source_hash(start: State, ids: Sequence[int]) -> str:
    """The `source` in the metadata of a state that has read exactly these ids after the state `start`."""
    digest = _hash_state(start)
    digest.update(_pack(ids))
    return str(digest.hexdigest())


def read_document(
    model: nn.Module,
    ids: Sequence[int],
    path: Path,
    *,
    start: State,
    metadata: StateMetadata,
    progress: ProgressCallback | None = None,
    on_write_error: WriteErrorHandler | None = None,
) -> ReadResult:
    """The state after `ids`, which follow the state `start`; from the file if possible, and stored in it afterwards.

    metadata: of the result; `tokens` and `source` are filled in here. on_write_error: called if the file cannot be
    written; None raises OSError. An interrupt takes effect after the current chunk and keeps what has been read. Raises
    UsageError if there are no ids.
    """
    if not ids:
        raise UsageError("there are no tokens to read")
    metadata = replace(metadata, source="")
    partial_path = path.with_name(path.name + PARTIAL)
    files = [_load_prefix(file, model, start, metadata, ids) for file in (path, partial_path)]
    saved = [file for file in files if file is not None]
    state, before = max(saved, key=lambda file: file.metadata.tokens, default=LoadedState(start, metadata))
    done = begin = before.tokens
    if begin == len(ids):
        with _handle_write_errors(on_write_error):
            partial_path.unlink(missing_ok=True)
            if (before.template, before.title) != (metadata.template, metadata.title) or not path.exists():
                before = replace(before, template=metadata.template, title=metadata.title)
                write_state(path, state, before)
        return ReadResult(state, before, 0)
    digest = _hash_state(start)
    digest.update(_pack(ids[:begin]))
    with catch_signals() as stop:
        for count, output in prefill_chunks(model, ids[begin:], state):
            digest.update(_pack(ids[done : begin + count]))
            done, state = begin + count, output.state
            metadata = replace(metadata, tokens=done, source=digest.hexdigest())
            if progress is not None:
                progress(done, len(ids))
            if done < len(ids) and (stop.number or count % SAVE_INTERVAL == 0):
                with _handle_write_errors(on_write_error):
                    write_state(partial_path, state, metadata)
                if stop.number:
                    message = f"{done:,} of {len(ids):,} tokens are read and saved; the same command reads the rest"
                    raise Interrupted(stop.number, message)
        with _handle_write_errors(on_write_error):
            write_state(path, state, metadata)
            partial_path.unlink(missing_ok=True)
    return ReadResult(state, metadata, len(ids) - begin)


def evict_oldest(folder: Path, limit: int) -> None:
    """Delete the least recently used state files of a folder until at most `limit` bytes remain."""
    files = []
    with suppress(OSError):
        for path in (*folder.glob("*.state"), *folder.glob(f"*.state{PARTIAL}")):
            with suppress(OSError):  # another process may evict as well
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
    for _, size, path in sorted(files, reverse=True):
        limit -= size
        if limit < 0:
            with suppress(OSError):
                path.unlink()


def mark_used(path: Path) -> None:
    """Record that a state file has been used, for `evict_oldest`."""
    with suppress(OSError):
        os.utime(path)


def _load_prefix(
    file: Path, model: nn.Module, start: State, metadata: StateMetadata, ids: Sequence[int]
) -> LoadedState | None:
    """The state in a file, if this model made it and it has read a prefix of `ids`."""
    try:
        state, stored = read_state(file)
        state.check(get_config(model), 1)
    except StateError:
        return None
    if stored.identity != metadata.identity or not 0 < stored.tokens <= len(ids):
        return None
    if stored.source != source_hash(start, ids[: stored.tokens]):
        return None
    return LoadedState(state.to(get_device(model)), stored)


def _hash_state(state: State) -> Any:
    digest = hashlib.sha256()
    for tensor in state.tensors().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest


def _pack(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<u4").tobytes()


@contextmanager
def _handle_write_errors(handler: WriteErrorHandler | None) -> Iterator[None]:
    """Pass an OSError to the handler, if there is one."""
    try:
        yield
    except OSError as error:
        if handler is None:
            raise
        handler(error)
