"""Sampling: from logits to one token, by the rules of the RWKV ecosystem, with a random stream for each sequence.

The order is that of the `rwkv` package: bans, penalties, softmax, top-p, top-k, temperature, sample. The temperature
comes after the cuts, as p^(1/T), so it never changes which tokens are possible. `sample_reference` is the
specification; the native library is the fast implementation of the same rules.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fledge.core.errors import FledgeError, UsageError
from fledge.engine import native_sampling
from fledge.native.library import library

MAX_SEED = 2**63 - 1

MAX_GAP = 708.0
"""A token whose logit is further below the highest is never sampled: exp(-gap) is no normal number any more."""

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when to stop. Raises UsageError with the field and its value."""

    temperature: float = 1.0  # 0 takes the most probable token, the lowest id if several are equally probable
    top_p: float = 0.85  # keep the fewest most probable tokens that have at least this probability; 1 keeps all
    top_k: int = 0  # then keep this many; 0 keeps all
    presence_penalty: float = 0.0  # subtracted from the logit of every token that was already sampled
    frequency_penalty: float = 0.0  # subtracted once for each time a token was sampled
    penalty_decay: float = 0.996  # earlier occurrences are multiplied by this after each token
    seed: int | None = None  # None: a random seed, which is recorded
    ban: tuple[int, ...] = ()  # ids that are never sampled
    max_tokens: int = 256
    stop: tuple[str, ...] = ()  # generation ends before any of these texts; a single str counts as one text

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop))
        object.__setattr__(self, "ban", _as_tuple("ban", self.ban))
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_integer("top_k", self.top_k, 0)
        _check_number("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _check_number("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _check_number("penalty_decay", self.penalty_decay, 0.0, 1.0)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED)
        _check_integer("max_tokens", self.max_tokens, 1)
        for token in self.ban:
            _check_integer("ban", token, 0)
        for text in self.stop:
            if not isinstance(text, str) or not text or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UsageError(f"stop holds {text!r}; a stop text is a str of at least one character, valid Unicode")

    def with_overrides(self, overrides: dict[str, Any]) -> SamplingParams:
        """These settings with some fields replaced. Raises UsageError for a name that is not a field."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in names:
                similar = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {similar[0]!r}?" if similar else f"the settings are {', '.join(names)}"
                raise UsageError(f"there is no sampling setting {name!r}; {hint}")
        return dataclasses.replace(self, **overrides)


class Sampler:
    """Samples the tokens of one sequence.

    Keeps the random stream and the count of each sampled token. The n-th token uses the n-th number of the stream, so a
    seed gives the same tokens whatever else the process does. Used by one thread at a time.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._random = torch.Generator().manual_seed(self.seed)
        self._numbers = list[float]()  # the next numbers of the stream, in reverse; one call of torch makes 64
        self._banned_ids = np.array([min(token, MAX_SEED) for token in params.ban], np.int64)
        # Each sampled token has a position in the next two arrays, whose length is the capacity.
        self._positions: dict[int, int] = {}
        self._previous_ids, self._previous_frequencies = np.zeros(16, np.int64), np.zeros(16)

    def sample(self, logits: Tensor, allowed: Mask | None = None) -> int:
        """The next token for logits (V,) on any device, which are not changed.

        allowed: (V,); other tokens are never sampled, as if they were banned (`Constraint.token_mask` returns it).
        Raises UsageError if no token can be sampled, FledgeError if the logits hold NaN or infinity.
        """
        (token,) = sample_batch([self], [logits], [allowed])
        if isinstance(token, FledgeError):
            raise token
        return token

    def prepare(self, logits: Tensor, allowed: Mask | None = None) -> SampleInput:
        """The input of the next sample. Consumes a number of the random stream."""
        if not self._numbers:
            self._numbers = torch.rand(64, generator=self._random, dtype=torch.float64).tolist()[::-1]
        logits = logits.detach().to("cpu", torch.float32).contiguous()
        if allowed is not None:
            assert allowed.shape == logits.shape and allowed.dtype == np.bool_, "the mask needs one bool per token"
            allowed = np.ascontiguousarray(allowed)
        count = len(self._positions)
        previous_ids, previous_frequencies = self._previous_ids[:count], self._previous_frequencies[:count]
        return SampleInput(
            self.params, logits, allowed, self._banned_ids, previous_ids, previous_frequencies, self._numbers.pop()
        )

    def record(self, token: int) -> None:
        """Count a token that was sampled."""
        params = self.params
        if params.presence_penalty or params.frequency_penalty:
            position = self._positions.setdefault(token, len(self._positions))
            if position == len(self._previous_ids):
                self._previous_ids = np.resize(self._previous_ids, 2 * position)
                self._previous_frequencies = np.resize(self._previous_frequencies, 2 * position)
                self._previous_frequencies[position:] = 0.0
            self._previous_frequencies *= params.penalty_decay
            self._previous_frequencies[position] += 1.0
            self._previous_ids[position] = token


class SampleInput(NamedTuple):
    """Everything that determines one sampled token."""

    params: SamplingParams
    logits: Tensor  # (V,) float32 on the CPU, contiguous
    allowed: Mask | None  # (V,)
    banned_ids: Ids
    previous_ids: Ids  # (n,) tokens that were sampled before
    previous_frequencies: Floats  # (n,) how often each was, with decay
    uniform: float  # the random number, from 0 to below 1


def sample_batch(
    samplers: Sequence[Sampler], logits: Sequence[Tensor] | Tensor, allowed: Sequence[Mask | None]
) -> list[int | FledgeError]:
    """The next token of each sampler, or the error that `Sampler.sample` raises. Rows are independent of each other.

    Uses the native library if there is one. Its sums differ from those of numpy in the last bits, so a token may differ
    if the random number falls on the boundary between two tokens.
    """
    inputs = [sampler.prepare(*each) for sampler, *each in zip(samplers, logits, allowed, strict=True)]
    tokens = sample_reference(inputs) if library() is None else sample_native(inputs)
    for sampler, token in zip(samplers, tokens, strict=True):
        if not isinstance(token, FledgeError):
            sampler.record(token)
    return tokens


def sample_native(inputs: Sequence[SampleInput]) -> list[int | FledgeError]:
    """As `sample_reference`, in the native library."""
    if not inputs:
        return []
    vocab_size = inputs[0].logits.numel()
    assert all(each.logits.numel() == vocab_size for each in inputs), "all rows must be of the same model"
    results = native_sampling.sample([_native_input(each) for each in inputs], vocab_size)
    return [
        result if result >= 0 else _native_error(result, each) for result, each in zip(results, inputs, strict=True)
    ]


def _native_input(each: SampleInput) -> native_sampling.NativeSampleInput:
    params, allowed = each.params, each.allowed
    return native_sampling.NativeSampleInput(
        each.logits.data_ptr(),
        None if allowed is None else allowed.ctypes.data,
        *_address_and_length(each.banned_ids),
        *_address_and_length(each.previous_ids),
        _address_and_length(each.previous_frequencies)[0],
        params.presence_penalty,
        params.frequency_penalty,
        params.temperature,
        params.top_p,
        min(params.top_k, each.logits.numel()),
        each.uniform,
    )


def _address_and_length(values: Ids | Floats) -> tuple[int | None, int]:
    return (values.ctypes.data, len(values)) if len(values) else (None, 0)


def _native_error(code: int, each: SampleInput) -> FledgeError:
    if code == native_sampling.BANNED_ID_OUT_OF_RANGE:
        return _unknown_ban(each)
    if code != native_sampling.NO_TOKENS:
        return _not_finite(math.nan if code == native_sampling.HAS_NAN else math.inf)
    if each.allowed is None:
        return _all_banned(each.params, len(each.logits))
    return _none_allowed(int(each.allowed.sum()))


def sample_reference(inputs: Sequence[SampleInput]) -> list[int | FledgeError]:
    """The token of each input, or the error that prevents it. This is the specification, in numpy."""
    results = list[int | FledgeError]()
    for each in inputs:
        try:
            results.append(_sample_one(each))
        except FledgeError as error:
            results.append(error)
    return results


def _sample_one(each: SampleInput) -> int:
    logits = _apply_penalties(each)
    candidates = None if each.allowed is None else _allowed_ids(each.allowed, logits)
    ids, weights = compute_distribution(logits if candidates is None else logits[candidates], each.params)
    sums = weights.cumsum(0)
    token = ids[torch.searchsorted(sums, each.uniform * sums[-1], right=True)]
    return int(token if candidates is None else candidates[token])


def _apply_penalties(each: SampleInput) -> Tensor:
    """A copy of the logits (V,) with bans and penalties."""
    if len(each.banned_ids) and each.banned_ids.max() >= len(each.logits):
        raise _unknown_ban(each)
    # numpy makes the copy: torch would use several threads, which then busy-wait for more work on the very cores that
    # the next token needs.
    logits = torch.from_numpy(each.logits.numpy().copy())
    logits[torch.from_numpy(each.banned_ids)] = -math.inf
    penalty = each.params.presence_penalty + each.params.frequency_penalty * torch.from_numpy(each.previous_frequencies)
    logits[torch.from_numpy(each.previous_ids)] -= penalty.float()
    return logits


def _allowed_ids(allowed: Mask, logits: Tensor) -> Tensor:
    """Ids (n,), ascending, of the allowed tokens. Most grammars leave few, which makes sampling cheaper."""
    ids = np.flatnonzero(allowed)
    if not (logits.numpy()[ids] != -math.inf).any():
        raise _none_allowed(len(ids))
    return torch.from_numpy(ids)


def compute_distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that can be sampled and their weights: softmax, top-p, top-k, then p^(1/T).

    logits: (V,) float32 on the CPU, with bans and penalties. Returns ids (n,) int64, ascending, and weights (n,)
    float64, with a largest value of 1 (divide them by their sum to get probabilities).
    """
    scores = logits.numpy()
    highest = float(scores.max())
    if math.isnan(highest) or highest == math.inf:
        raise _not_finite(highest)
    if highest == -math.inf:
        raise _all_banned(params, len(logits))
    if params.temperature == 0.0:
        return torch.tensor([int(scores.argmax())]), torch.ones(1, dtype=torch.float64)
    gaps = highest - scores.astype(np.float64)
    weights = np.exp(-gaps)  # proportional to the probabilities
    ranking = np.argsort(-scores, kind="stable")  # most probable token first, the lower id first among equals
    ranking = ranking[gaps[ranking] <= MAX_GAP]
    if params.top_p < 1.0:
        sums = weights[ranking].cumsum()
        last = min(int(np.searchsorted(sums, params.top_p * weights.sum())), len(ranking) - 1)
        ranking = ranking[scores[ranking] >= scores[ranking[last]]]  # tokens as probable as the last one stay too
    if params.top_k:
        ranking = ranking[: params.top_k]
    ids = np.sort(ranking)
    if params.temperature == 1.0:
        return torch.from_numpy(ids), torch.from_numpy(weights[ids])
    # The temperature is applied to logarithms: p^(1/T) itself would underflow at a low T.
    return torch.from_numpy(ids), (torch.from_numpy(gaps[ids]) / -params.temperature).exp()


def _unknown_ban(each: SampleInput) -> UsageError:
    return UsageError(f"ban holds {max(each.params.ban)}; this model's ids end at {len(each.logits) - 1}")


def _none_allowed(count: int) -> UsageError:
    return UsageError(f"no token can be sampled: the grammar allows {count}, and all of them are banned or impossible")


def _all_banned(params: SamplingParams, count: int) -> UsageError:
    return UsageError(f"ban leaves no token to sample ({len(params.ban)} ids of {count} are banned)")


def _not_finite(highest: float) -> FledgeError:
    return FledgeError(
        f"the logits of the model contain {highest}: in float16 or bfloat16 the model may have overflowed, so try "
        "float32 (--dtype float32); in float32 its weights are damaged, or its training has diverged"
    )


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}; it must be a tuple") from None


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    is_finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_finite or not low <= value <= high:
        span = f"from {low:g} to {high:g}" if math.isfinite(high) else "of 0 or more" if low == 0 else "that is finite"
        raise UsageError(f"{name} is {value!r}; it must be a number {span}")


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        span = f"from {low} to {high}" if high else f"of {low} or more"
        raise UsageError(f"{name} is {value!r}; it must be a whole number {span}")
