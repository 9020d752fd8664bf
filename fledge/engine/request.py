"""What is asked of the engine and what it answers: token ids, states and reasons. No text.

A request reads its ids once; its continuations (`n`) then go on from the same state, each with its own random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from fledge.core.errors import FledgeError
from fledge.engine.generation import ModelOutput
from fledge.engine.sampling import SamplingParams
from fledge.engine.structured.grammar import Constraint
from fledge.models.state import State
from fledge.models.state_slice import StateSlice

EngineFinishReason = Literal["eos", "length", "complete", "read", "deadline", "failed"]
"""Why nothing more comes: the end-of-text id, `max_tokens`, a constraint that is complete, all ids of a request without
continuations, a deadline that has passed, or an error of this request alone."""


class QueueFull(FledgeError):
    """As many requests as may wait are waiting."""


@dataclass(frozen=True, eq=False)
class Request:
    """Ids to be read, and what is to be drawn after them."""

    ids: tuple[int, ...]  # at least one; none where `start` is a Cursor
    params: SamplingParams = field(default_factory=SamplingParams)
    start: State | ModelOutput | None = None  # what they follow; None: the model's own beginning
    n: int = 1  # continuations; 0 reads only
    priority: int = 0  # higher goes first: one step of it is worth `Scheduler.grace` seconds of waiting
    deadline: float | None = None  # on the engine's clock
    cache_namespace: str | None = (
        None  # of the state cache: texts of other spaces, or other starts, never meet; None: no cache
    )
    message_ends: tuple[int, ...] = ()  # places in `ids` at which others may begin to differ: ends of messages
    constraint: Constraint | None = None
    logprobs: int | None = None  # how many of the most probable ids are told with every token; None: not even its own


class TokenLogprob(NamedTuple):
    """How probable the model found a token, before bans, penalties and cuts; and the most probable ones beside it."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (id, log probability), falling


class TokenOutput(NamedTuple):
    """One event of one continuation: a token, an end, or both in one."""

    request_id: int
    choice: int  # of the n; 0 where nothing is drawn
    state_before: StateSlice  # the state that has not read `token`
    token: int | None = None
    finish_reason: EngineFinishReason | None = None
    seed: int = 0  # gives this continuation again
    cached_tokens: int = 0  # tokens of the prompt that the cache spared
    logprob: TokenLogprob | None = None
    logits: Tensor | None = None  # (V,), with "read": of the token that would follow
    error: FledgeError | None = None  # with "failed"
    prompt_incomplete: bool = (
        False  # with "deadline": the prompt was not read to its end, and `before` knows a part of it
    )
