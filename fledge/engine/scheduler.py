"""Scheduling: which requests take part in the next model call, and with how many tokens.

A recurrent state can be set aside at no cost, so every decision lasts for one call only: the requests with the lowest
rank take part and all others wait, whether they have started or not. The rank is the arrival time, minus
`priority_seconds` for each step of priority. A request therefore waits for a finite number of others, however many
arrive later.

Each sequence that decodes gets one token. Prompts share a token budget that keeps the call short for decoding
sequences: half of it in equal parts, the rest to the first request in line. After a quiet period, prompts may be read
in one long call, because one short pause disturbs decoding less than many calls that each take twice as long.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import NamedTuple

from fledge.engine.sequence import RequestState, Sequence

MIN_PREFILL_TOKENS = 16
"""Prompt tokens that a call may always contain, so that prompts make progress however long a call takes."""


class ScheduledTokens(NamedTuple):
    """Tokens of one sequence in a model call: a part of the prompt (`sequence` is None), or the last sampled token."""

    request_state: RequestState
    sequence: Sequence | None
    ids: tuple[int, ...]


class LatencyModel:
    """Predicts the duration of a model call as a + b * tokens, fitted to past calls with exponential decay."""

    DECAY = 0.98

    def __init__(self) -> None:
        self._n = self._x = self._xx = self._t = self._xt = 0.0  # weighted sums

    def update(self, tokens: int, seconds: float) -> None:
        """Add the measurement of one call."""
        for name, value in (
            ("_n", 1.0),
            ("_x", tokens),
            ("_xx", tokens**2),
            ("_t", seconds),
            ("_xt", tokens * seconds),
        ):
            setattr(self, name, self.DECAY * getattr(self, name) + value)

    def tokens_within(self, factor: float) -> float:
        """The tokens of a call that takes `factor` times as long as a call with one token; 0 if unknown."""
        fixed_seconds, seconds_per_token = self._fit()
        if not seconds_per_token:
            return 0.0
        return (factor * (fixed_seconds + seconds_per_token) - fixed_seconds) / seconds_per_token

    def predict_seconds(self, tokens: float) -> float:
        """The predicted duration of a call with this many tokens; 0 if unknown."""
        fixed_seconds, seconds_per_token = self._fit()
        return fixed_seconds + seconds_per_token * tokens if seconds_per_token else 0.0

    @property
    def seconds_per_token(self) -> float:
        """Seconds that one more token adds to a call; 0 if unknown."""
        return self._fit()[1]

    def _fit(self) -> tuple[float, float]:
        """The coefficients a and b, or zeros if they are unknown."""
        spread = self._n * self._xx - self._x**2
        if spread <= 1e-9 * self._n * self._xx:
            return 0.0, 0.0
        slope = (self._n * self._xt - self._x * self._t) / spread
        return (max((self._t - slope * self._x) / self._n, 0.0), slope) if slope > 0 else (0.0, 0.0)


class BurstBudget:
    """A token bucket of seconds by which calls may exceed the ordinary duration; ordinary calls refill it."""

    def __init__(self, limit: float, refill_rate: float) -> None:
        """limit: seconds; the budget starts full. refill_rate: the share of the time of ordinary calls to add."""
        self._limit, self._refill_rate, self._seconds = limit, refill_rate, limit

    @property
    def available(self) -> float:
        """Seconds that may be spent now: 0 until the budget is at least half full.

        So it is spent on a few long calls, not on many slightly longer ones.
        """
        return self._seconds if self._seconds >= self._limit / 2 else 0.0

    def refill(self) -> None:
        """Fill the budget up to its limit."""
        self._seconds = self._limit

    def accrue(self, seconds: float) -> None:
        """Add a share of the duration of an ordinary call."""
        self._seconds = min(self._limit, self._seconds + self._refill_rate * seconds)

    def spend(self, seconds: float) -> None:
        """Subtract the seconds by which a call exceeds the ordinary duration."""
        self._seconds = max(0.0, self._seconds - seconds)


@dataclass
class Scheduler:
    """The scheduling policy and its parameters."""

    slots: int = 64  # sequences in one call
    prefill_chunk: int = 512  # prompt tokens in one call while no sequence decodes
    latency_factor: float = 2.5  # a call with prompts may take this many times as long as one with one token
    burst_seconds: float = 0.2  # seconds by which calls may exceed that after a quiet period
    refill_rate: float = 0.15  # fraction of the time of each ordinary call that refills `burst_seconds`
    priority_seconds: float = 10.0  # waiting time that one step of priority is worth

    def __post_init__(self) -> None:
        self._budget = BurstBudget(self.burst_seconds, self.refill_rate)

    def compute_rank(self, arrived: float, priority: int) -> float:
        """The position in line of a request; a lower rank goes first."""
        return arrived - self.priority_seconds * priority

    def select(self, request_states: abc.Sequence[RequestState]) -> list[RequestState]:
        """The requests that take part in the next call, first in line first.

        A request that needs more slots than are free waits, and the next one may take part.
        """
        free, selected = self.slots, []
        for request_state in sorted(request_states, key=lambda each: (each.rank, each.request_id)):
            if request_state.num_sequences <= free:
                selected.append(request_state)
                free -= request_state.num_sequences
        return selected

    def select_scoring(self, request_states: abc.Sequence[RequestState]) -> RequestState | None:
        """The request whose next chunk of prompt log probabilities is computed: the one that has read least."""
        scoring = [request for request in request_states if request.is_scoring]
        return min(scoring, key=lambda each: (each.computed_tokens, each.rank, each.request_id), default=None)

    def schedule(self, request_states: abc.Sequence[RequestState], latency: LatencyModel) -> list[ScheduledTokens]:
        """The tokens of the next call: all last sampled tokens, and as many prompt tokens as there is time for.

        The call spends or refills the burst budget.
        """
        decoding = [
            ScheduledTokens(request_state, sequence, (sequence.last_token,))
            for request_state in request_states
            for sequence in request_state.sequences
        ]
        prefilling = [request for request in request_states if request.is_prefilling]
        if not decoding:
            self._budget.refill()  # no sequence waits
            return self._split_budget(prefilling, self.prefill_chunk) if prefilling else []
        if not prefilling:
            self._budget.accrue(latency.predict_seconds(len(decoding)))
            return decoding
        seconds_per_token = latency.seconds_per_token
        ordinary = max(MIN_PREFILL_TOKENS, int(latency.tokens_within(self.latency_factor)) - len(decoding))
        extra = int(self._budget.available / seconds_per_token) if seconds_per_token else 0
        prompts = self._split_budget(prefilling, min(self.prefill_chunk, ordinary + extra))
        count = sum(len(tokens.ids) for tokens in prompts)
        if count > ordinary:
            self._budget.spend((count - ordinary) * seconds_per_token)
        else:
            self._budget.accrue(latency.predict_seconds(len(decoding) + count))
        return decoding + prompts

    def _split_budget(self, prefilling: abc.Sequence[RequestState], budget: int) -> list[ScheduledTokens]:
        """Divide a token budget: one half in equal parts, the rest to the requests in order of rank."""
        share = max(1, budget // (2 * len(prefilling)))
        shares = [len(request_state.next_prompt_ids(share)) for request_state in prefilling]
        rest = budget - sum(shares)
        scheduled = []
        for request_state, count in zip(prefilling, shares, strict=True):
            ids = request_state.next_prompt_ids(count + max(rest, 0))
            rest -= len(ids) - count
            scheduled.append(ScheduledTokens(request_state, None, ids))
        return scheduled
