"""Who takes part in the next call of the model, and with how many tokens.

A recurrent state can be put aside at no cost, so nothing is settled for longer than one call: the requests that come
first take part, all others stand by, whether they have begun or not. First is who came first, with a lead of `grace`
seconds for each step of priority; so a request waits for finitely many others, however many come after it.

Those who write get a token each. Those who read share a budget of tokens that keeps the call short for the writers:
half of it in equal parts, the rest to the first in line. Prompts that come after a quiet time may be read in one long
call: writers who halt once for a moment are disturbed less than by many calls that each take twice as long.
Not here: states, models.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import NamedTuple

from fledge.engine.sequence import RequestState, Sequence

MIN_PREFILL_TOKENS = 16
"""Tokens of prompts that a call may always hold: reading must come forward however long a call takes."""


class ScheduledTokens(NamedTuple):
    """Some tokens of one sequence: of a prompt (no strand), or the last one written."""

    request_state: RequestState
    sequence: Sequence | None
    ids: tuple[int, ...]


class LatencyModel:
    """How long a call takes, a + b tokens, learnt from the calls so far; the older, the less they count."""

    DECAY = 0.98

    def __init__(self) -> None:
        self._n = self._x = self._xx = self._t = self._xt = 0.0  # weighted sums

    def update(self, tokens: int, seconds: float) -> None:
        """One call more."""
        for name, value in (
            ("_n", 1.0),
            ("_x", tokens),
            ("_xx", tokens**2),
            ("_t", seconds),
            ("_xt", tokens * seconds),
        ):
            setattr(self, name, self.DECAY * getattr(self, name) + value)

    def tokens_within(self, factor: float) -> float:
        """The tokens of a call that takes `times` as long as one with a single token; 0 where that is unknown."""
        fixed, each = self._line()
        return (factor * (fixed + each) - fixed) / each if each else 0.0

    def predict_seconds(self, tokens: float) -> float:
        """How long a call with so many tokens takes; 0 where that is unknown."""
        fixed, each = self._line()
        return fixed + each * tokens if each else 0.0

    @property
    def seconds_per_token(self) -> float:
        """Seconds that a token adds; 0 where that is unknown."""
        return self._line()[1]

    def _line(self) -> tuple[float, float]:
        """a and b; zeros where they are unknown."""
        spread = self._n * self._xx - self._x**2
        if spread <= 1e-9 * self._n * self._xx:
            return 0.0, 0.0
        each = (self._n * self._xt - self._x * self._t) / spread
        return (max((self._t - each * self._x) / self._n, 0.0), each) if each > 0 else (0.0, 0.0)


class BurstBudget:
    """Seconds by which calls may be longer than the ordinary, saved up while they are not."""

    def __init__(self, limit: float, refill_rate: float) -> None:
        """limit: seconds; it begins full. saving: the share of the time of ordinary calls that is put in."""
        self._limit, self._refill_rate, self._seconds = limit, refill_rate, limit

    @property
    def available(self) -> float:
        """What may be spent: nothing below a half, so that there are few long calls, not many that are a bit longer."""
        return self._seconds if self._seconds >= self._limit / 2 else 0.0

    def refill(self) -> None:
        """Up to the limit."""
        self._seconds = self._limit

    def accrue(self, seconds: float) -> None:
        """An ordinary call has taken so long."""
        self._seconds = min(self._limit, self._seconds + self._refill_rate * seconds)

    def spend(self, seconds: float) -> None:
        """A call is so much longer."""
        self._seconds = max(0.0, self._seconds - seconds)


@dataclass
class Scheduler:
    """The rules and their numbers."""

    slots: int = 64  # sequences in one call
    prefill_chunk: int = 512  # tokens of prompts in one call while nobody writes
    latency_factor: float = (
        2.5  # how much longer a call may take, for the sake of readers, than one with a single token
    )
    burst_seconds: float = 0.2  # seconds that long calls may take beyond that, after a quiet time
    refill_rate: float = 0.15  # share of the time of ordinary calls that is saved up for that
    priority_seconds: float = 10.0  # seconds that one step of priority is worth

    def __post_init__(self) -> None:
        self._budget = BurstBudget(self.burst_seconds, self.refill_rate)

    def compute_rank(self, arrived: float, priority: int) -> float:
        """The place in the line; the lower goes first."""
        return arrived - self.priority_seconds * priority

    def select(self, request_states: abc.Sequence[RequestState]) -> list[RequestState]:
        """Those that take part, first ones first. Who needs more slots than are free stands by; the next may try."""
        free, found = self.slots, []
        for task in sorted(request_states, key=lambda task: (task.rank, task.request_id)):
            if task.num_sequences <= free:
                found.append(task)
                free -= task.num_sequences
        return found

    def schedule(self, request_states: abc.Sequence[RequestState], latency: LatencyModel) -> list[ScheduledTokens]:
        """What the next call reads: the tokens written last, and as much of the prompts as there is time for.

        That time is spent by asking.
        """
        written = [
            ScheduledTokens(task, strand, (strand.last_token,)) for task in request_states for strand in task.sequences
        ]
        readers = [task for task in request_states if task.is_prefilling]
        if not written:
            self._budget.refill()  # nobody is kept waiting
            return self._split_budget(readers, self.prefill_chunk) if readers else []
        if not readers:
            self._budget.accrue(latency.predict_seconds(len(written)))
            return written
        each = latency.seconds_per_token
        ordinary = max(MIN_PREFILL_TOKENS, int(latency.tokens_within(self.latency_factor)) - len(written))
        extra = int(self._budget.available / each) if each else 0
        read = self._split_budget(readers, min(self.prefill_chunk, ordinary + extra))
        count = sum(len(piece.ids) for piece in read)
        if count > ordinary:
            self._budget.spend((count - ordinary) * each)
        else:
            self._budget.accrue(latency.predict_seconds(len(written) + count))
        return written + read

    def _split_budget(self, readers: abc.Sequence[RequestState], budget: int) -> list[ScheduledTokens]:
        """The budget divided: everybody a share of one half, the rest to the first in line."""
        share = max(1, budget // (2 * len(readers)))
        wanted = [len(task.next_prompt_ids(share)) for task in readers]
        rest = budget - sum(wanted)
        found = []
        for task, least in zip(readers, wanted, strict=True):
            ids = task.next_prompt_ids(least + max(rest, 0))
            rest -= len(ids) - least
            found.append(ScheduledTokens(task, None, ids))
        return found
