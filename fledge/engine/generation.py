"""The token loop: read a prompt, then draw tokens one at a time. Ids only; no text, no stop strings.

Nothing here keeps anything between calls. Every step carries the state from before its token, so that whoever takes
the tokens can go back to any of them: a state is a value, and keeping one costs a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fledge.core.errors import TokenizerError, UsageError
from fledge.engine.sampling import Sampler
from fledge.models.config import ModelConfig
from fledge.models.state import State

ProgressCallback = Callable[[int, int], None]
"""Called with (tokens read so far, tokens in all)."""

PREFILL_CHUNK = 512
"""Tokens of a prompt read in one call: enough to be fast, few enough that memory does not grow with the prompt."""


class ModelOutput(NamedTuple):
    """A place in a text: the scores of the next token (V,) float32, and the state after everything before it."""

    logits: Tensor
    state: State


class SampledToken(NamedTuple):
    """One drawn token; `before` is the state that has not read it yet."""

    id: int
    state_before: State


def forward(model: nn.Module, ids: Sequence[int], state: State | None) -> ModelOutput:
    """Read `ids` (at least one) in one call, without gradients.

    Not in inference mode: its tensors could never again take part in training, and a state is anybody's to use.
    """
    idx = torch.tensor([list(ids)], dtype=torch.long, device=get_device(model))  # (1, T)
    with torch.no_grad():
        logits, state = model(idx, state, last=True)
    return ModelOutput(logits[0, -1], state)


def prefill_chunks(
    model: nn.Module, ids: Sequence[int], state: State | None, chunk: int = PREFILL_CHUNK
) -> Iterator[tuple[int, ModelOutput]]:
    """Read `ids` by pieces of `chunk`: after each, how many have been read and the place reached."""
    if chunk < 1:
        raise UsageError(f"chunk is {chunk}; it must be at least 1")
    for start in range(0, len(ids), chunk):
        piece = ids[start : start + chunk]
        cursor = forward(model, piece, state)
        state = cursor.state
        yield start + len(piece), cursor


def prefill(
    model: nn.Module,
    ids: Sequence[int],
    state: State | None = None,
    *,
    chunk: int = PREFILL_CHUNK,
    progress: ProgressCallback | None = None,
) -> ModelOutput:
    """Read a whole prompt of at least one token, after `state` or from the beginning: (logits (V,), state)."""
    cursor = None
    for done, cursor in prefill_chunks(model, ids, state, chunk):  # noqa: B007 - the last one is the result
        if progress is not None:
            progress(done, len(ids))
    if cursor is None:
        raise UsageError("there are no tokens to read")
    return cursor


def advance_state(model: nn.Module, ids: Sequence[int], state: State) -> State:
    """The state after `ids`, which may be none."""
    return prefill(model, ids, state).state if ids else state


def generate_tokens(
    model: nn.Module, logits: Tensor, state: State, sampler: Sampler, max_tokens: int
) -> Iterator[SampledToken]:
    """Draw up to `max_tokens` tokens from the place (logits (V,), state).

    A token is read by the model only when the next one is asked for; so the last one is in nobody's state yet.
    """
    for left in range(max_tokens, 0, -1):
        token = sampler.sample(logits)
        yield SampledToken(token, state)
        if left > 1:
            logits, state = forward(model, [token], state)


def get_config(model: nn.Module) -> ModelConfig:
    """The sizes of `model`."""
    config = model.config
    assert isinstance(config, ModelConfig)
    return config


def check_token_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise TokenizerError for an id that no token has."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise TokenizerError(f"token id {token} is outside this model's vocabulary of {vocab_size}")


def get_device(model: nn.Module) -> torch.device:
    """Where the weights of `model` are."""
    return next(chain(model.parameters(), model.buffers())).device


def make_initial_state(model: nn.Module) -> State:
    """The state of one sequence of which nothing has been read: zeros, or the tuned state of the checkpoint."""
    begin: Any = model.initial_state
    with torch.no_grad():
        state: State = begin(1)
    return state
