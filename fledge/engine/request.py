"""Requests to the engine and its outputs: token ids, states and finish reasons.

The prompt of a request is computed once. Its `n` completions continue from the same state, each with its own random
numbers.
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
"""Why a completion ended: the end-of-text id, `max_tokens`, a constraint that is complete, the end of the prompt of a
request with `n=0`, a deadline that has passed, or an error of this completion."""


class QueueFull(FledgeError):
    """The engine has as many requests as it accepts."""


class EngineStopped(QueueFull):
    """The engine shuts down and accepts no more requests."""


@dataclass(frozen=True, eq=False)
class Request:
    """Token ids to read, and how to continue them.

    prompt_logprobs: also compute the log probability of every prompt token, and of this many most probable
    alternatives (0: the token only). The first token of the prompt has one only if `start` is a ModelOutput. Such a
    prompt is read in chunks of `PROMPT_LOGPROBS_CHUNK` tokens, one per engine step, and neither reads nor fills the
    prefix cache. If the deadline passes, the chunks read so far have been output; the first chunk is always read.
    """

    ids: tuple[int, ...]  # at least one; if `start` is a ModelOutput, only together with `prompt_logprobs`
    params: SamplingParams = field(default_factory=SamplingParams)
    start: State | ModelOutput | None = None  # what the ids follow; None: the model's initial state
    n: int = 1  # completions; 0 only reads the prompt
    priority: int = 0  # higher goes first; one step is worth `Scheduler.priority_seconds` of waiting time
    deadline: float | None = None  # on the engine's clock
    cache_namespace: str | None = None  # of the prefix cache; must differ for different `start`; None: do not cache
    message_ends: tuple[int, ...] = ()  # positions in `ids` where other prompts may diverge
    constraint: Constraint | None = None
    logprobs: int | None = None  # alternatives to report with each sampled token; None: no log probabilities
    prompt_logprobs: int | None = None  # as `logprobs`, for the prompt
    should_return_logits: bool = False  # the first token of each completion comes with the logits it was sampled from


class TokenLogprob(NamedTuple):
    """The log probability of a token, before bans, penalties and truncation, and the most probable alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log probability), highest first


class PromptLogprobs(NamedTuple):
    """Log probabilities of consecutive prompt tokens."""

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]  # one per id; None for a first token that follows no known logits
    computed_tokens: int  # tokens of the prompt that the state has read so far


class TokenOutput(NamedTuple):
    """One output of one completion: a token, an end, both, or log probabilities of the prompt."""

    request_id: int
    choice: int  # index of the completion; 0 for a request that only reads
    state_before: StateSlice  # the state before `token`
    token: int | None = None
    finish_reason: EngineFinishReason | None = None
    seed: int = 0  # reproduces this completion
    cached_tokens: int = 0  # tokens of the prompt that came from the prefix cache
    logprob: TokenLogprob | None = None  # of `token`
    logits: Tensor | None = None  # (V,) after the prompt; with "read", or if the request asks for them
    error: FledgeError | None = None  # with "failed"
    prompt_incomplete: bool = False  # with "deadline" or "failed": `state_before` has not read the whole prompt
    prompt_logprobs: PromptLogprobs | None = None
