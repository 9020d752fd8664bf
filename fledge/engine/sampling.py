"""From scores to one token: the sampling rules of the RWKV ecosystem, with a random stream of each sequence's own.

The order is that of the `rwkv` package: ban, penalties, softmax, top-p, top-k, temperature, draw. Temperature comes
after the cuts, as p^(1/T), so it never changes which tokens are possible. Not here: the model, text, stop strings.
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

GROUPS = 2048
WIDEST = 32.0
"""The top-p cutoff is looked for among tokens grouped by logit: the gaps to the highest logit, up to WIDEST, in equal
parts. Sorting 65536 tokens takes a CPU 5 ms, counting them into groups and sorting one group 0.2 ms."""

FARTHEST = 708.0
"""A token whose logit is this far below the highest is never drawn: e to the power of less is no normal number."""

Scores = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when to stop. Raises UsageError naming the field and its value."""

    temperature: float = 1.0  # 0 takes the most probable token, the lowest id where several are
    top_p: float = 0.85  # keep the fewest most probable tokens that hold this much probability; 1 keeps all
    top_k: int = 0  # then keep this many; 0 keeps all
    presence_penalty: float = 0.0  # taken off the logit of every token already generated
    frequency_penalty: float = 0.0  # taken off once for each time it was generated
    penalty_decay: float = 0.996  # old times count for this much less after each draw
    seed: int | None = None  # None: one is drawn and recorded
    ban: tuple[int, ...] = ()  # ids that are never drawn
    max_tokens: int = 256
    stop: tuple[str, ...] = ()  # generation ends before any of these texts; a lone str counts as one

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        object.__setattr__(self, "ban", _tuple("ban", self.ban))
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0)
        _whole("top_k", self.top_k, 0)
        _number("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _number("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _number("penalty_decay", self.penalty_decay, 0.0, 1.0)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED)
        _whole("max_tokens", self.max_tokens, 1)
        for token in self.ban:
            _whole("ban", token, 0)
        for text in self.stop:
            if not isinstance(text, str) or not text or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UsageError(f"stop holds {text!r}; a stop text is a str of at least one character, valid Unicode")

    def with_overrides(self, overrides: dict[str, Any]) -> SamplingParams:
        """These settings with some fields replaced. Raises UsageError for a name that is not a field."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known ones: {', '.join(known)}"
                raise UsageError(f"there is no sampling setting {name!r}; {hint}")
        return dataclasses.replace(self, **overrides)


class Sampler:
    """Draws the tokens of one sequence.

    Holds what the rules need to remember: the random stream and how often each token came. The n-th draw uses the n-th
    number of the stream, so a seed gives the same tokens whatever else the process does. Used by one thread at a time.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._random = torch.Generator().manual_seed(self.seed)
        # Of the stream, the next one last; taken many at a time, as that costs the same.
        self._numbers = list[float]()
        self._banned = np.array([min(token, MAX_SEED) for token in params.ban], np.int64)
        self._places: dict[int, int] = {}  # of the tokens drawn so far in the next two, which are longer than needed
        self._known, self._times = np.zeros(16, np.int64), np.zeros(16)

    def sample(self, logits: Tensor, allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """The next token for logits (V,) on any device; they are not changed.

        allowed: (V,); no other token is drawn, as if it were banned (`Constraint.mask` gives it).
        Raises UsageError if no token may be drawn, FledgeError for logits that are not numbers.
        """
        (drawn,) = sample_batch([self], [logits], [allowed])
        if isinstance(drawn, FledgeError):
            raise drawn
        return drawn

    def prepare(self, logits: Tensor, allowed: npt.NDArray[np.bool_] | None = None) -> SampleInput:
        """The draw that is next. Takes its number off the stream."""
        if not self._numbers:
            self._numbers = torch.rand(64, generator=self._random, dtype=torch.float64).tolist()[::-1]
        logits = logits.detach().to("cpu", torch.float32).contiguous()
        if allowed is not None:
            assert allowed.shape == logits.shape and allowed.dtype == np.bool_, "one answer for each token"
            allowed = np.ascontiguousarray(allowed)
        count = len(self._places)
        known, times = self._known[:count], self._times[:count]
        return SampleInput(self.params, logits, allowed, self._banned, known, times, self._numbers.pop())

    def record(self, token: int) -> None:
        """Count a token that was drawn."""
        params = self.params
        if params.presence_penalty or params.frequency_penalty:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._known):
                self._known, self._times = np.resize(self._known, 2 * place), np.resize(self._times, 2 * place)
                self._times[place:] = 0.0
            self._times *= params.penalty_decay
            self._times[place] += 1.0
            self._known[place] = token


class SampleInput(NamedTuple):
    """One draw: all that decides which token it gives."""

    params: SamplingParams
    logits: Tensor  # (V,) float32 on the CPU, contiguous
    allowed: npt.NDArray[np.bool_] | None  # (V,)
    banned_ids: Ids
    seen_ids: Ids  # tokens that came before, and how often each did
    seen_counts: Floats
    uniform: float  # from 0 to below 1


def sample_batch(
    samplers: Sequence[Sampler], logits: Sequence[Tensor] | Tensor, allowed: Sequence[npt.NDArray[np.bool_] | None]
) -> list[int | FledgeError]:
    """The next token of each sampler, or the error that `next` raises; no row knows of the others.

    In the native library where that is there, side by side. Its sums are not those of numpy to the last bit, so without
    it a token may differ where the random number falls on a border between two.
    """
    chances = [sampler.prepare(*given) for sampler, *given in zip(samplers, logits, allowed, strict=True)]
    found = sample_reference(chances) if library() is None else sample_native(chances)
    for sampler, token in zip(samplers, found, strict=True):
        if not isinstance(token, FledgeError):
            sampler.record(token)
    return found


def sample_native(chances: Sequence[SampleInput]) -> list[int | FledgeError]:
    """As `draw_reference`, in the native library."""
    if not chances:
        return []
    vocab_size = chances[0].logits.numel()
    assert all(chance.logits.numel() == vocab_size for chance in chances), "rows of one model"
    found = native_sampling.sample([_row(chance) for chance in chances], vocab_size)
    return [token if token >= 0 else _refusal(token, chance) for token, chance in zip(found, chances, strict=True)]


def _row(chance: SampleInput) -> native_sampling.NativeSampleInput:
    params, allowed = chance.params, chance.allowed
    return native_sampling.NativeSampleInput(
        chance.logits.data_ptr(),
        None if allowed is None else allowed.ctypes.data,
        *_array(chance.banned_ids),
        *_array(chance.seen_ids),
        _array(chance.seen_counts)[0],
        params.presence_penalty,
        params.frequency_penalty,
        params.temperature,
        params.top_p,
        min(params.top_k, chance.logits.numel()),
        chance.uniform,
    )


def _array(values: Ids | Floats) -> tuple[int | None, int]:
    """Address and length."""
    return (values.ctypes.data, len(values)) if len(values) else (None, 0)


def _refusal(code: int, chance: SampleInput) -> FledgeError:
    if code == native_sampling.BAN_OUT_OF_RANGE:
        return _unknown_ban(chance)
    if code != native_sampling.NO_TOKEN:
        return _not_numbers(math.nan if code == native_sampling.NAN_LOGIT else math.inf)
    if chance.allowed is None:
        return _all_banned(chance.params, len(chance.logits))
    return _none_allowed(int(chance.allowed.sum()))


def sample_reference(chances: Sequence[SampleInput]) -> list[int | FledgeError]:
    """The token of each chance, or the error in its way. This is the specification."""
    found = list[int | FledgeError]()
    for chance in chances:
        try:
            found.append(_drawn(chance))
        except FledgeError as error:
            found.append(error)
    return found


def _drawn(chance: SampleInput) -> int:
    scores = _penalised(chance)
    among = None if chance.allowed is None else _among(chance.allowed, scores)
    ids, weights = compute_distribution(scores if among is None else scores[among], chance.params)
    sums = weights.cumsum(0)
    drawn = ids[torch.searchsorted(sums, chance.uniform * sums[-1], right=True)]
    return int(drawn if among is None else among[drawn])


def _penalised(chance: SampleInput) -> Tensor:
    if len(chance.banned_ids) and chance.banned_ids.max() >= len(chance.logits):
        raise _unknown_ban(chance)
    # Copied by numpy: torch would copy with several threads, and those then wait in a loop for more of such work,
    # on the very cores that the next token needs.
    logits = torch.from_numpy(chance.logits.numpy().copy())  # (V,)
    logits[torch.from_numpy(chance.banned_ids)] = -math.inf
    penalty = chance.params.presence_penalty + chance.params.frequency_penalty * torch.from_numpy(chance.seen_counts)
    logits[torch.from_numpy(chance.seen_ids)] -= penalty.float()
    return logits


def _among(allowed: npt.NDArray[np.bool_], scores: Tensor) -> Tensor:
    """Ids (n,), rising, of the tokens among which to draw. Few, as most grammars leave, cost a draw less than all."""
    ids = np.flatnonzero(allowed)
    if not (scores.numpy()[ids] != -math.inf).any():
        raise _none_allowed(len(ids))
    return torch.from_numpy(ids)


def compute_distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their weights: softmax, top-p, top-k, then p^(1/T).

    logits: (V,) float32 on the CPU, bans and penalties already in. Returns ids (n,) int64, rising, and weights (n,)
    float64, the largest of them 1 (divide by their sum for probabilities).
    """
    scores = logits.numpy()  # numpy's comparisons and masks are several times as fast as torch's
    highest = float(scores.max())
    if math.isnan(highest) or highest == math.inf:
        raise _not_numbers(highest)
    if highest == -math.inf:
        raise _all_banned(params, len(logits))
    if params.temperature == 0.0:
        return torch.tensor([int(scores.argmax())]), torch.ones(1, dtype=torch.float64)
    gaps = highest - scores.astype(np.float64)
    weights = np.exp(-gaps)  # the probabilities, times the same number
    ids = _top_p(scores, gaps, weights, params.top_p)
    if 0 < params.top_k < len(ids):
        ids = ids[_top_k(scores[ids], params.top_k)]
    if params.temperature == 1.0:
        return torch.from_numpy(ids), torch.from_numpy(weights[ids])
    # The temperature acts on logarithms: p^(1/T) itself would underflow to nothing at a low T.
    return torch.from_numpy(ids), (torch.from_numpy(gaps[ids]) / -params.temperature).exp()


def _top_p(scores: Scores, gaps: Floats, weights: Floats, top_p: float) -> Ids:
    """Ids (n,) of what stays: all tokens at least as probable as the first rank whose running sum reaches top_p."""
    if top_p == 1.0:
        return np.flatnonzero(gaps <= FARTHEST)
    total = weights.sum()
    # Tokens below this bound hold less than half of 1 - top_p even all together, so the sum is reached before them.
    ids = np.flatnonzero(weights > (1.0 - top_p) * total / (2 * len(weights)))
    return np.flatnonzero(scores >= _cutoff(scores[ids], gaps[ids], weights[ids], top_p * total))


def _cutoff(scores: Scores, gaps: Floats, weights: Floats, goal: float) -> float:
    """The score at which the running sum of the weights, largest first, reaches `goal` (the last, should it not).

    gaps (n,): to the highest score. Sums whole groups of neighbours, and sorts only the one where it happens.
    """
    width = min(float(gaps.max()), WIDEST) / (GROUPS - 1) or 1.0
    group = np.minimum(gaps / width, GROUPS - 1).astype(np.int64)
    sums = np.bincount(group, weights).cumsum()
    reached = min(int(np.searchsorted(sums, goal)), len(sums) - 1)
    inside = np.flatnonzero(group == reached)
    ranked = inside[np.argsort(-scores[inside])]
    before = sums[reached - 1] if reached else 0.0
    place = int(np.searchsorted(before + weights[ranked].cumsum(), goal))
    return float(scores[ranked[min(place, len(ranked) - 1)]])


def _top_k(scores: Scores, top_k: int) -> Ids:
    """Places (top_k,), rising, of the highest scores; among equals the first ones."""
    least = float(torch.from_numpy(scores).topk(top_k).values[-1])
    above = np.flatnonzero(scores > least)
    level = np.flatnonzero(scores == least)
    return np.sort(np.concatenate([above, level[: top_k - len(above)]]))


def _unknown_ban(chance: SampleInput) -> UsageError:
    return UsageError(f"ban holds {max(chance.params.ban)}; this model's ids end at {len(chance.logits) - 1}")


def _none_allowed(count: int) -> UsageError:
    return UsageError(f"no token may come here: the grammar allows {count}, and none of them can be drawn")


def _all_banned(params: SamplingParams, count: int) -> UsageError:
    return UsageError(f"ban leaves no token to draw ({len(params.ban)} ids of {count} are banned)")


def _not_numbers(highest: float) -> FledgeError:
    return FledgeError(
        f"the model predicts nothing, its logits hold {highest}: in float16 or bfloat16 it may have overflowed, "
        "and float32 helps (--dtype float32); in float32 its weights are damaged, or its training has diverged"
    )


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}; it must be a tuple") from None


def _number(name: str, value: Any, low: float, high: float) -> None:
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not sound or not low <= value <= high:
        span = f"from {low:g} to {high:g}" if math.isfinite(high) else "of 0 or more" if low == 0 else "that is finite"
        raise UsageError(f"{name} is {value!r}; it must be a number {span}")


def _whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        raise UsageError(f"{name} is {value!r}; it must be a whole number from {low}{f' to {high}' if high else ' up'}")
