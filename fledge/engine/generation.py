"""Model calls for one sequence: prefill a prompt, then sample tokens one at a time.

`generate_tokens` is the reference implementation of generation: the engine produces the same tokens. Each sampled token
comes with the state before it, so a caller can go back to any token. A state is a value, so keeping one costs a
reference.
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
"""Called with (tokens read so far, all tokens)."""

PREFILL_CHUNK = 512
"""Prompt tokens per model call: enough to be fast, few enough that the memory does not grow with the prompt."""


class ModelOutput(NamedTuple):
    """The logits (V,) float32 of the next token, and the state after everything before it."""

    logits: Tensor
    state: State


class SampledToken(NamedTuple):
    """A sampled token; `state_before` has not read it."""

    id: int
    state_before: State


def forward(model: nn.Module, ids: Sequence[int], state: State | None) -> ModelOutput:
    """Read `ids` (at least one) in one model call, without gradients.

    This does not use inference mode, whose tensors cannot be used in training: callers may use a state for anything.
    """
    idx = torch.tensor([list(ids)], dtype=torch.long, device=get_device(model))  # (1, T)
    with torch.no_grad():
        logits, state = model(idx, state, last=True)
    return ModelOutput(logits[0, -1], state)


def prefill_chunks(
    model: nn.Module, ids: Sequence[int], state: State | None, chunk: int = PREFILL_CHUNK
) -> Iterator[tuple[int, ModelOutput]]:
    """Read `ids` in chunks. Yields the number of tokens read and the output after each chunk."""
    if chunk < 1:
        raise UsageError(f"chunk is {chunk}; it must be at least 1")
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        output = forward(model, part, state)
        state = output.state
        yield start + len(part), output


def prefill(
    model: nn.Module,
    ids: Sequence[int],
    state: State | None = None,
    *,
    chunk: int = PREFILL_CHUNK,
    progress: ProgressCallback | None = None,
) -> ModelOutput:
    """Read a prompt of at least one token, after `state` or after the model's initial state."""
    output = None
    for done, output in prefill_chunks(model, ids, state, chunk):  # noqa: B007 - the last one is the result
        if progress is not None:
            progress(done, len(ids))
    if output is None:
        raise UsageError("there are no tokens to read")
    return output


def advance_state(model: nn.Module, ids: Sequence[int], state: State) -> State:
    """The state after `ids`, which may be empty."""
    return prefill(model, ids, state).state if ids else state


def generate_tokens(
    model: nn.Module, logits: Tensor, state: State, sampler: Sampler, max_tokens: int
) -> Iterator[SampledToken]:
    """Sample up to `max_tokens` tokens, the first one from `logits` (V,).

    The model reads a token only when the next one is requested, so no state has read the last one.
    """
    for remaining in range(max_tokens, 0, -1):
        token = sampler.sample(logits)
        yield SampledToken(token, state)
        if remaining > 1:
            logits, state = forward(model, [token], state)


def get_config(model: nn.Module) -> ModelConfig:
    """The sizes of `model`."""
    config = model.config
    assert isinstance(config, ModelConfig)
    return config


def check_token_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise TokenizerError for an id outside the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise TokenizerError(f"token id {token} is outside this model's vocabulary of {vocab_size}")


def get_device(model: nn.Module) -> torch.device:
    """The device of the weights of `model`."""
    return next(chain(model.parameters(), model.buffers())).device


def make_initial_state(model: nn.Module) -> State:
    """The state of one sequence before any token: zeros, or the tuned state of the checkpoint."""
    initial_state: Any = model.initial_state
    with torch.no_grad():
        state: State = initial_state(1)
    return state
