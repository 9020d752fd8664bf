"""States and metadata for the tests of the state stores."""

from __future__ import annotations

from pathlib import Path

from prefixes import state_of

from fledge.engine.states.shared_store import SharedStateStore
from fledge.engine.states.state_file import StateMetadata, encode_state
from fledge.models.state import State, WkvState

AMPLE = 1 << 24
METADATA = StateMetadata("0" * 64, "model", 3, "world", created="2026-01-01T00:00:00+00:00")
SECRET = b"s" * 32


def make_state(value: int) -> State:
    """A state with finite numbers that differ for each `value`."""
    state = state_of([value])
    assert isinstance(state, WkvState)
    return WkvState(state.att_shift, state.wkv.nan_to_num(), state.ffn_shift)


SIZE = len(encode_state(make_state(1), METADATA))


def open_shared_store(folder: Path, limit: int = AMPLE) -> SharedStateStore:
    """A store as one of several servers opens it."""
    return SharedStateStore(folder, METADATA.identity, SECRET, limit_bytes=limit)
