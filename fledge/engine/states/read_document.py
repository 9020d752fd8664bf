"""A long text, read once: its state is a file, on the way as well, so that nobody reads the same text twice.

    path            the state after the whole text
    path + ".part"  the state after some of it, from a reading that was cut off

Who asks for a text again gets its state from the file, or what is there of it and then the rest. That the file is of
this text and this model is never guessed: its card tells the weights, and as `source` the SHA-256 of the state that the
text began from and of all ids read since (four bytes each, little-endian). Not here: what is done with the state.
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

from fledge.core.errors import StateError, UsageError
from fledge.core.interrupts import Interrupted, catch_signals
from fledge.engine.generation import PREFILL_CHUNK, ProgressCallback, prefill_chunks
from fledge.engine.llm.llm import LLM
from fledge.engine.states.state_file import StateMetadata, identity_of, read_state, write_state
from fledge.models.state import State

PARTIAL = ".part"
OFTEN = 64 * PREFILL_CHUNK
"""Tokens after which a part is written, against ends that nobody announces."""

Trouble = Callable[[OSError], None]


@dataclass(frozen=True, eq=False)
class ReadResult:
    """A text that has been read."""

    state: State
    card: StateMetadata
    new: int  # tokens read for this; all others were known


def source_of(llm: LLM, ids: Sequence[int]) -> str:
    """What the card of a state says that has read these ids and nothing else."""
    digest = _beginning(llm)
    digest.update(_packed(ids))
    return str(digest.hexdigest())


def read_kept(
    llm: LLM,
    ids: Sequence[int],
    path: Path,
    *,
    template: str | None = None,
    title: str = "",
    progress: ProgressCallback | None = None,
    trouble: Trouble | None = None,
) -> ReadResult:
    """The state after `ids`, from the file where it is known, and in the file afterwards.

    An interrupt ends it after the chunk at hand and keeps what was read. trouble: told what cannot be written, where
    that is no reason to lose the state; None raises it. Raises UsageError where there is nothing to read.
    """
    if not ids:
        raise UsageError("there are no tokens to read")
    card = replace(StateMetadata.of(llm, identity_of(llm), tokens=0, template=template, title=title), source="")
    part = path.with_name(path.name + PARTIAL)
    found = [known for file in (path, part) if (known := _known(file, llm, card, ids)) is not None]
    state, before = max(found, key=lambda known: known[1].tokens, default=(llm.read([]), card))
    done = begin = before.tokens
    if begin == len(ids):
        with _told(trouble):
            part.unlink(missing_ok=True)
            if (before.template, before.title) != (card.template, card.title) or not path.exists():
                before = replace(before, template=card.template, title=card.title)
                write_state(path, state, before)
        return ReadResult(state, before, 0)
    digest = _beginning(llm)
    digest.update(_packed(ids[:begin]))
    with catch_signals() as stop:
        for count, cursor in prefill_chunks(llm.model, ids[begin:], state):
            digest.update(_packed(ids[done : begin + count]))
            done, state = begin + count, cursor.state
            card = replace(card, tokens=done, source=digest.hexdigest())
            if progress is not None:
                progress(done, len(ids))
            if done < len(ids) and (stop.number or count % OFTEN == 0):
                with _told(trouble):
                    write_state(part, state, card)
                if stop.number:
                    kept = f"{done:,} of {len(ids):,} tokens have been read and kept; the same command reads the rest"
                    raise Interrupted(stop.number, kept)
        with _told(trouble):
            write_state(path, state, card)
            part.unlink(missing_ok=True)
    return ReadResult(state, card, len(ids) - begin)


def make_room(folder: Path, limit: int) -> None:
    """Remove the states in a folder that were not used for longest, until `limit` bytes are left."""
    files = []
    with suppress(OSError):
        for path in (*folder.glob("*.state"), *folder.glob(f"*.state{PARTIAL}")):
            with suppress(OSError):  # somebody else makes room as well
                facts = path.stat()
                files.append((facts.st_mtime, facts.st_size, path))
    for _, size, path in sorted(files, reverse=True):
        limit -= size
        if limit < 0:
            with suppress(OSError):
                path.unlink()


def mark_used(path: Path) -> None:
    """Note that a state has been of use, for `make_room`."""
    with suppress(OSError):
        os.utime(path)


def _known(file: Path, llm: LLM, card: StateMetadata, ids: Sequence[int]) -> tuple[State, StateMetadata] | None:
    """What a file holds, if that is a state of this model after a beginning of `ids`."""
    try:
        state, found = read_state(file)
        state.check(llm.config, 1)
    except StateError:
        return None
    if found.identity != card.identity or not 0 < found.tokens <= len(ids):
        return None
    return (state.to(llm.device), found) if found.source == source_of(llm, ids[: found.tokens]) else None


def _beginning(llm: LLM) -> Any:
    digest = hashlib.sha256()
    for tensor in llm.read([]).tensors().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest


def _packed(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<u4").tobytes()


@contextmanager
def _told(trouble: Trouble | None) -> Iterator[None]:
    """Hand an OSError to whoever wants to be told of it."""
    try:
        yield
    except OSError as error:
        if trouble is None:
            raise
        trouble(error)
