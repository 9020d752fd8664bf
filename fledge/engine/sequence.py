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
from fledge.engine.sampling import Sampler, draw_all
from fledge.engine.structured.grammar import Constraint, Mask
from fledge.models.state_slice import StateSlice


@dataclass(eq=False)
class Sequence:
    """One continuation. `token` has been drawn and not read yet."""

    choice: int
    row: StateSlice
    sampler: Sampler
    left: int  # tokens that may still be drawn
    constraint: Constraint | None
    token: int


@dataclass(eq=False)
class RequestState:
    """A request, its place in the line, and how far it is."""

    number: int
    request: Request
    rank: float  # the lower goes first
    row: StateSlice  # of the ids read so far
    done: int = 0  # how many of the ids have been read
    cached: int = 0  # and how many of these were known
    begun: bool = False
    cuts: deque[int] = field(default_factory=deque)  # places where a snapshot is due
    strands: list[Sequence] = field(default_factory=list)

    @property
    def width(self) -> int:
        """The sequences it takes in a batch."""
        return len(self.strands) if self.strands else max(self.request.n, 1)

    @property
    def reading(self) -> bool:
        """Whether ids are left to be read."""
        return not self.strands

    def ahead(self, most: int) -> tuple[int, ...]:
        """The ids to be read next: up to `most`, and not beyond a place where a snapshot is due."""
        end = min(self.done + most, len(self.request.ids))
        return self.request.ids[self.done : min(end, self.cuts[0]) if self.cuts else end]

    def park(self) -> None:
        """Let go of the batch that its states lie in, as it may be a while until it goes on."""
        self.row = StateSlice(self.row.alone())
        for strand in self.strands:
            strand.row = StateSlice(strand.row.alone())


class PendingSample(NamedTuple):
    """A continuation that is to get its next token, and the scores (V,) from which it is drawn."""

    task: RequestState
    strand: Sequence
    scores: Tensor


def next_tokens(due: abc.Sequence[PendingSample]) -> list[int | FledgeError]:
    """For each a token that its constraint has accepted, or the error in its way."""
    found: dict[int, int | FledgeError] = {}
    masks: dict[int, Mask | None] = {}
    for place, (_, strand, _) in enumerate(due):
        try:
            masks[place] = None if strand.constraint is None else strand.constraint.mask()
        except FledgeError as error:
            found[place] = error
    samplers, scores = [due[place].strand.sampler for place in masks], [due[place].scores for place in masks]
    for place, token in zip(masks, draw_all(samplers, scores, list(masks.values())), strict=True):
        found[place] = _accepted(due[place].strand.constraint, token)
    return [found[place] for place in range(len(due))]


def _accepted(constraint: Constraint | None, token: int | FledgeError) -> int | FledgeError:
    try:
        if constraint is not None and not isinstance(token, FledgeError):
            constraint.accept(token)
    except FledgeError as error:
        return error
    return token
