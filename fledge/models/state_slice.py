"""One sequence of a batched state, named without being copied.

A batch that changes its members at every step would copy all their states at every step if each had to be cut out and
stacked anew. A `StateSlice` says where a state lies; the native library reads it there, and elsewhere `gathered`
copies.
Not here: who is in a batch (fledge.engine).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fledge.models.state import State


@dataclass(frozen=True, eq=False, slots=True)
class StateSlice:
    """The sequence `index` of `state`. It keeps the whole batch in memory for as long as somebody holds it."""

    state: State
    index: int = 0

    def alone(self) -> State:
        """As a batch of one: a copy that keeps nothing else alive, or the state itself where it has no other row."""
        return self.state if self.state.batch == 1 else self.state.rows(self.index)


def gather_states(rows: Sequence[StateSlice]) -> State:
    """The rows side by side as one batch; nothing is copied where they are all of one state, in its order."""
    state = rows[0].state
    if all(row.state is state for row in rows):
        places = [row.index for row in rows]
        return state if places == list(range(state.batch)) else state.rows(places)
    return State.stack([row.alone() for row in rows])
