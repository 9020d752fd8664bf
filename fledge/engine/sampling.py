"""From scores to one token: the sampling rules of the RWKV ecosystem, with a random stream of each sequence's own.

The order is that of the `rwkv` package: ban, penalties, softmax, top-p, top-k, temperature, draw. Temperature comes
after the cuts, as p^(1/T), so it never changes which tokens are possible. Not here: the model, text, stop strings.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fledge.core.errors import FledgeError, UsageError

LARGEST_SEED = 2**63 - 1

GROUPS = 2048
WIDEST = 32.0
"""The top-p cutoff is looked for among tokens grouped by logit: the gaps to the highest logit, up to WIDEST, in equal
parts. Sorting 65536 tokens takes a CPU 5 ms, counting them into groups and sorting one group 0.2 ms."""

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
            _whole("seed", self.seed, 0, LARGEST_SEED)
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
        self._places: dict[int, int] = {}  # of the tokens drawn so far in `_counts`
        self._counts: Floats = np.zeros(0)

    def next(self, logits: Tensor, allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """The next token for logits (V,) float32 on any device; they are not changed.

        allowed: (V,); no other token is drawn, as if it were banned (`Constraint.mask` gives it).
        Raises UsageError if no token may be drawn, FledgeError for logits that are not numbers.
        """
        scores = self._penalised(logits)
        among = None if allowed is None else _among(allowed, scores)
        ids, weights = distribution(scores if among is None else scores[among], self.params)
        sums = weights.cumsum(0)
        place = torch.rand((), generator=self._random, dtype=torch.float64) * sums[-1]
        drawn = ids[torch.searchsorted(sums, place, right=True)]
        token = int(drawn if among is None else among[drawn])
        self._remember(token)
        return token

    def _penalised(self, logits: Tensor) -> Tensor:
        # Copied by numpy: torch would copy with several threads, and those then wait in a loop for more of such work,
        # on the very cores that the next token needs.
        logits = torch.from_numpy(logits.detach().to("cpu", torch.float32).numpy().copy())  # (V,)
        if self.params.ban:
            if max(self.params.ban) >= len(logits):
                raise UsageError(f"ban holds {max(self.params.ban)}; this model's ids end at {len(logits) - 1}")
            logits[list(self.params.ban)] = -math.inf
        if self._places:
            counts = torch.from_numpy(self._counts).float()
            penalty = self.params.presence_penalty + self.params.frequency_penalty * counts
            logits[torch.tensor(list(self._places))] -= penalty
        return logits

    def _remember(self, token: int) -> None:
        params = self.params
        if params.presence_penalty or params.frequency_penalty:
            self._counts *= params.penalty_decay
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._counts):
                self._counts = np.append(self._counts, 0.0)
            self._counts[place] += 1.0


def _among(allowed: npt.NDArray[np.bool_], scores: Tensor) -> Tensor:
    """Ids (n,), rising, of the tokens among which to draw. Few, as most grammars leave, cost a draw less than all."""
    assert allowed.shape == scores.shape, "one answer for each token"
    ids = np.flatnonzero(allowed)
    if not (scores.numpy()[ids] != -math.inf).any():
        raise UsageError(f"no token may come here: the grammar allows {len(ids)}, and none of them can be drawn")
    return torch.from_numpy(ids)


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their weights: softmax, top-p, top-k, then p^(1/T).

    logits: (V,) float32 on the CPU, bans and penalties already in. Returns ids (n,) int64, rising, and weights (n,)
    float64, the largest of them 1 (divide by their sum for probabilities).
    """
    scores = logits.numpy()  # numpy's comparisons and masks are several times as fast as torch's
    highest = float(scores.max())
    if math.isnan(highest) or highest == math.inf:
        raise FledgeError(
            f"the model predicts nothing, its logits hold {highest}: in float16 or bfloat16 it may have overflowed, "
            "and float32 helps (--dtype float32); in float32 its weights are damaged, or its training has diverged"
        )
    if highest == -math.inf:
        raise UsageError(f"ban leaves no token to draw ({len(params.ban)} ids of {len(logits)} are banned)")
    if params.temperature == 0.0:
        return torch.tensor([int(scores.argmax())]), torch.ones(1, dtype=torch.float64)
    gaps = highest - scores.astype(np.float64)
    weights = np.exp(-gaps)  # the probabilities, times the same number
    ids = _top_p(gaps, weights, params.top_p)
    if 0 < params.top_k < len(ids):
        ids = ids[_top_k(weights[ids], params.top_k)]
    if params.temperature == 1.0:
        return torch.from_numpy(ids), torch.from_numpy(weights[ids])
    # The temperature acts on logarithms: p^(1/T) itself would underflow to nothing at a low T.
    return torch.from_numpy(ids), (torch.from_numpy(gaps[ids]) / -params.temperature).exp()


def _top_p(gaps: Floats, weights: Floats, top_p: float) -> Ids:
    """Ids (n,) of what stays: all tokens at least as probable as the first rank whose running sum reaches top_p."""
    if top_p == 1.0:
        return np.flatnonzero(weights > 0)
    total = weights.sum()
    # Tokens below this bound hold less than half of 1 - top_p even all together, so the sum is reached before them.
    ids = np.flatnonzero(weights > (1.0 - top_p) * total / (2 * len(weights)))
    return np.flatnonzero(weights >= _cutoff(gaps[ids], weights[ids], top_p * total))


def _cutoff(gaps: Floats, weights: Floats, goal: float) -> float:
    """The weight at which the running sum of the weights, largest first, reaches `goal` (the last, should it not).

    gaps (n,): of the logits to the highest. Sums whole groups of neighbours, and sorts only the one where it happens.
    """
    width = min(float(gaps.max()), WIDEST) / (GROUPS - 1) or 1.0
    group = np.minimum(gaps / width, GROUPS - 1).astype(np.int64)
    sums = np.bincount(group, weights).cumsum()
    reached = min(int(np.searchsorted(sums, goal)), len(sums) - 1)
    ranked = np.sort(weights[group == reached])[::-1]
    before = sums[reached - 1] if reached else 0.0
    place = int(np.searchsorted(before + ranked.cumsum(), goal))
    return float(ranked[min(place, len(ranked) - 1)])


def _top_k(weights: Floats, top_k: int) -> Ids:
    """Places (top_k,), rising, of the largest weights; among equals the first ones."""
    least = float(torch.from_numpy(weights).topk(top_k).values[-1])
    above = np.flatnonzero(weights > least)
    level = np.flatnonzero(weights == least)
    return np.sort(np.concatenate([above, level[: top_k - len(above)]]))


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
