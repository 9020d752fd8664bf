"""The state of a request in the engine: how much of its prompt is computed, and the completions being sampled."""

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
    """One completion of a request."""

    choice: int  # index of the completion in its request
    state_slice: StateSlice  # the state before `last_token`
    sampler: Sampler
    remaining_tokens: int  # how many more tokens may be sampled
    constraint: Constraint | None
    last_token: int  # sampled, not yet read by the model


@dataclass(eq=False)
class RequestState:
    """A request in the engine."""

    request_id: int
    request: Request
    rank: float  # requests with a lower rank go first
    state_slice: StateSlice  # the state after `computed_tokens` tokens of the prompt
    last_logits: Tensor | None = None  # (V,) of the token after `state_slice`, if known before the prompt is prefilled
    computed_tokens: int = 0  # tokens of the prompt that `state_slice` has read
    cached_tokens: int = 0  # the part of them that came from the prefix cache
    is_started: bool = False
    snapshot_positions: deque[int] = field(default_factory=deque)  # prompt lengths at which to store a snapshot
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def num_sequences(self) -> int:
        """Places that this request takes in a batch."""
        return len(self.sequences) if self.sequences else max(self.request.n, 1)

    @property
    def is_prefilling(self) -> bool:
        """Whether the prompt is still being read."""
        return not self.sequences

    @property
    def is_scoring(self) -> bool:
        """Whether log probabilities of prompt tokens are still to be computed."""
        return self.request.prompt_logprobs is not None and self.computed_tokens < len(self.request.ids)

    def next_prompt_ids(self, max_tokens: int) -> tuple[int, ...]:
        """The prompt ids to read next: at most `max_tokens`, and not past the next snapshot position."""
        end = min(self.computed_tokens + max_tokens, len(self.request.ids))
        if self.snapshot_positions:
            end = min(end, self.snapshot_positions[0])
        return self.request.ids[self.computed_tokens : end]

    def detach_state(self) -> None:
        """Copy the states out of their batches, so that a waiting request does not keep whole batches in memory."""
        self.state_slice = StateSlice(self.state_slice.extract())
        for sequence in self.sequences:
            sequence.state_slice = StateSlice(sequence.state_slice.extract())


class PendingSample(NamedTuple):
    """A sequence whose next token is to be sampled."""

    request_state: RequestState
    sequence: Sequence
    logits: Tensor  # (V,)


def sample_next_tokens(pending: abc.Sequence[PendingSample]) -> list[int | FledgeError]:
    """Sample the next token of each sequence and advance its constraint. Returns the token or the error of each."""
    results: dict[int, int | FledgeError] = {}
    masks: dict[int, Mask | None] = {}
    for index, (_, sequence, _) in enumerate(pending):
        try:
            masks[index] = None if sequence.constraint is None else sequence.constraint.token_mask()
        except FledgeError as error:
            results[index] = error
    samplers, logits = [pending[index].sequence.sampler for index in masks], [pending[index].logits for index in masks]
    for index, token in zip(masks, sample_batch(samplers, logits, list(masks.values())), strict=True):
        results[index] = _accept(pending[index].sequence.constraint, token)
    return [results[index] for index in range(len(pending))]


def _accept(constraint: Constraint | None, token: int | FledgeError) -> int | FledgeError:
    try:
        if constraint is not None and not isinstance(token, FledgeError):
            constraint.accept(token)
    except FledgeError as error:
        return error
    return token
