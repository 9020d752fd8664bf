"""A request on its way through the engine: what of it has been read, and the continuations being written.

And what both lead to: the tokens that are due, drawn for all continuations at once.
"""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fledge.core.errors import FledgeError
from fledge.engine.request import Request
from fledge.engine.sampling import Sampler, sample_batch
from fledge.engine.structured.grammar import Constraint, Mask
from fledge.models.state_slice import StateSlice


@dataclass(eq=False)
class Sequence:
    """One continuation. `token` has been drawn and not read yet."""

    choice: int
    state_slice: StateSlice
    sampler: Sampler
    remaining_tokens: int  # tokens that may still be drawn
    constraint: Constraint | None
    last_token: int


@dataclass(eq=False)
class RequestState:
    """A request, its place in the line, and how far it is."""

    request_id: int
    request: Request
    rank: float  # the lower goes first
    state_slice: StateSlice  # of the ids read so far
    computed_tokens: int = 0  # how many of the ids have been read
    cached_tokens: int = 0  # and how many of these were known
    is_started: bool = False
    snapshot_positions: deque[int] = field(default_factory=deque)  # places where a snapshot is due
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def num_sequences(self) -> int:
        """The sequences it takes in a batch."""
        return len(self.sequences) if self.sequences else max(self.request.n, 1)

    @property
    def is_prefilling(self) -> bool:
        """Whether ids are left to be read."""
        return not self.sequences

    def next_prompt_ids(self, max_tokens: int) -> tuple[int, ...]:
        """The ids to be read next: up to `most`, and not beyond a place where a snapshot is due."""
        end = min(self.computed_tokens + max_tokens, len(self.request.ids))
        return self.request.ids[
            self.computed_tokens : min(end, self.snapshot_positions[0]) if self.snapshot_positions else end
        ]

    def detach_state(self) -> None:
        """Let go of the batch that its states lie in, as it may be a while until it goes on."""
        self.state_slice = StateSlice(self.state_slice.alone())
        for strand in self.sequences:
            strand.state_slice = StateSlice(strand.state_slice.alone())


class PendingSample(NamedTuple):
    """A continuation that is to get its next token, and the scores (V,) from which it is drawn."""

    request_state: RequestState
    sequence: Sequence
    logits: Tensor


def sample_next_tokens(pending: abc.Sequence[PendingSample]) -> list[int | FledgeError]:
    """For each a token that its constraint has accepted, or the error in its way."""
    found: dict[int, int | FledgeError] = {}
    masks: dict[int, Mask | None] = {}
    for place, (_, strand, _) in enumerate(pending):
        try:
            masks[place] = None if strand.constraint is None else strand.constraint.token_mask()
        except FledgeError as error:
            found[place] = error
    samplers, scores = [pending[place].sequence.sampler for place in masks], [pending[place].logits for place in masks]
    for place, token in zip(masks, sample_batch(samplers, scores, list(masks.values())), strict=True):
        found[place] = _accepted(pending[place].sequence.constraint, token)
    return [found[place] for place in range(len(pending))]


def _accepted(constraint: Constraint | None, token: int | FledgeError) -> int | FledgeError:
    try:
        if constraint is not None and not isinstance(token, FledgeError):
            constraint.accept(token)
    except FledgeError as error:
        return error
    return token
