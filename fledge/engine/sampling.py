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

import torch
from torch import Tensor

from fledge.core.errors import FledgeError, UsageError

LARGEST_SEED = 2**63 - 1

FIRST_LOOK = 256
"""Tokens ranked first when looking for the top-p cutoff; a full sort of 65536 costs 7 ms on a CPU, this 0.2 ms."""


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
        self._counts: dict[int, float] = {}

    def next(self, logits: Tensor) -> int:
        """The next token for logits (V,) float32 on any device; they are not changed.

        Raises UsageError if no token may be drawn, FledgeError for logits that are not numbers.
        """
        ids, weights = distribution(self._penalised(logits), self.params)
        sums = weights.cumsum(0)
        place = torch.rand((), generator=self._random, dtype=torch.float64) * sums[-1]
        token = int(ids[torch.searchsorted(sums, place, right=True)])
        self._remember(token)
        return token

    def _penalised(self, logits: Tensor) -> Tensor:
        logits = logits.detach().to("cpu", torch.float32, copy=True)  # (V,)
        if self.params.ban:
            if max(self.params.ban) >= len(logits):
                raise UsageError(f"ban holds {max(self.params.ban)}; this model's ids end at {len(logits) - 1}")
            logits[list(self.params.ban)] = -math.inf
        if self._counts:
            counts = torch.tensor(list(self._counts.values()))
            penalty = self.params.presence_penalty + self.params.frequency_penalty * counts
            logits[list(self._counts)] -= penalty
        return logits

    def _remember(self, token: int) -> None:
        params = self.params
        if params.presence_penalty or params.frequency_penalty:
            self._counts = {known: count * params.penalty_decay for known, count in self._counts.items()}
            self._counts[token] = self._counts.get(token, 0.0) + 1.0


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their weights: softmax, top-p, top-k, then p^(1/T).

    logits: (V,) float32 on the CPU, bans and penalties already in. Returns ids (n,) int64, rising, and weights (n,)
    float64, the largest of them 1 (divide by their sum for probabilities).
    """
    highest = float(logits.max())
    if math.isnan(highest) or highest == math.inf:
        raise FledgeError(f"the model's logits hold {highest}; run it in float32 (dtype='float32')")
    if highest == -math.inf:
        raise UsageError(f"ban leaves no token to draw ({len(params.ban)} ids of {len(logits)} are banned)")
    if params.temperature == 0.0:
        return (logits == highest).nonzero()[:1, 0], torch.ones(1, dtype=torch.float64)
    scores = logits.double()
    ids = _top_p(scores.softmax(0), params.top_p)
    if 0 < params.top_k < len(ids):
        ids = ids[_top_k(scores[ids], params.top_k)]
    # The temperature acts on logarithms: p^(1/T) itself would underflow to nothing at a low T.
    return ids, ((scores[ids] - highest) / params.temperature).exp()


def logprob(logits: Tensor, token: int) -> float:
    """Natural logarithm of the probability the model itself gives `token`, before any sampling rule. logits: (V,)."""
    return float(logits[token].double() - logits.double().logsumexp(0))


def _top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Ids (n,) of what stays: all tokens at least as probable as the first rank whose running sum reaches top_p."""
    kept = probabilities > 0
    if top_p < 1.0:
        size, look = len(probabilities), FIRST_LOOK
        while True:
            ranked = probabilities.topk(min(look, size)).values
            reached = ranked.cumsum(0) >= top_p
            if bool(reached[-1]):
                kept = probabilities >= ranked[reached.nonzero()[0, 0]]
                break
            if look >= size:  # rounding alone kept the whole sum below top_p
                break
            look *= 16
    return kept.nonzero()[:, 0]


def _top_k(scores: Tensor, top_k: int) -> Tensor:
    """Places (top_k,), rising, of the highest scores; among equals the first ones."""
    least = scores.topk(top_k).values[-1]
    above = (scores > least).nonzero()[:, 0]
    level = (scores == least).nonzero()[:, 0]
    return torch.cat([above, level[: top_k - len(above)]]).sort().values


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
