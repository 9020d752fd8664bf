"""A reference to one sequence of a batched state, without a copy.

The members of a batch change at every step. Cutting out and stacking their states would copy all of them at every step.
A `StateSlice` is the position of a state instead. The native library reads the state there; other models use
`gather_states`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fledge.models.state import State


@dataclass(frozen=True, eq=False, slots=True)
class StateSlice:
    """The sequence `index` of `state`. A reference to it keeps the whole batch in memory."""

    state: State
    index: int = 0

    def extract(self) -> State:
        """The sequence as a batch of one: a copy that does not keep the batch, or the state itself if it is alone."""
        return self.state if self.state.batch == 1 else self.state.rows(self.index)


def gather_states(rows: Sequence[StateSlice]) -> State:
    """The sequences as one batch. Nothing is copied if they are all sequences of one state in its order."""
    state = rows[0].state
    if all(row.state is state for row in rows):
        indices = [row.index for row in rows]
        return state if indices == list(range(state.batch)) else state.rows(indices)
    return State.stack([row.extract() for row in rows])
