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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fledge.engine.task import Strand, Task

LEAST = 16
"""Tokens of prompts that a call may always hold: reading must come forward however long a call takes."""


class Piece(NamedTuple):
    """Some tokens of one sequence: of a prompt (no strand), or the last one written."""

    task: Task
    strand: Strand | None
    ids: tuple[int, ...]


class Pace:
    """How long a call takes, a + b tokens, learnt from the calls so far; the older, the less they count."""

    FADING = 0.98

    def __init__(self) -> None:
        self._n = self._x = self._xx = self._t = self._xt = 0.0  # weighted sums

    def learn(self, tokens: int, seconds: float) -> None:
        """One call more."""
        for name, value in (
            ("_n", 1.0),
            ("_x", tokens),
            ("_xx", tokens**2),
            ("_t", seconds),
            ("_xt", tokens * seconds),
        ):
            setattr(self, name, self.FADING * getattr(self, name) + value)

    def tokens(self, times: float) -> float:
        """The tokens of a call that takes `times` as long as one with a single token; 0 where that is unknown."""
        fixed, each = self._line()
        return (times * (fixed + each) - fixed) / each if each else 0.0

    def seconds(self, tokens: float) -> float:
        """How long a call with so many tokens takes; 0 where that is unknown."""
        fixed, each = self._line()
        return fixed + each * tokens if each else 0.0

    def _line(self) -> tuple[float, float]:
        """a and b; zeros where they are unknown."""
        spread = self._n * self._xx - self._x**2
        if spread <= 1e-9 * self._n * self._xx:
            return 0.0, 0.0
        each = (self._n * self._xt - self._x * self._t) / spread
        return (max((self._t - each * self._x) / self._n, 0.0), each) if each > 0 else (0.0, 0.0)


@dataclass
class Scheduler:
    """The rules and their numbers."""

    slots: int = 64  # sequences in one call
    chunk: int = 512  # tokens of prompts in one call while nobody writes
    patience: float = 2.5  # how much longer a call may take, for the sake of readers, than one with a single token
    stall: float = 0.2  # seconds that long calls may take beyond that, after a quiet time
    saving: float = 0.15  # share of the time of ordinary calls that is saved up for that
    grace: float = 10.0  # seconds that one step of priority is worth
    _saved: float = field(init=False, repr=False)  # seconds

    def __post_init__(self) -> None:
        self._saved = self.stall

    def rank(self, arrived: float, priority: int) -> float:
        """The place in the line; the lower goes first."""
        return arrived - self.grace * priority

    def chosen(self, tasks: Sequence[Task]) -> list[Task]:
        """Those that take part, first ones first. Who needs more slots than are free stands by; the next may try."""
        free, found = self.slots, []
        for task in sorted(tasks, key=lambda task: (task.rank, task.number)):
            if task.width <= free:
                found.append(task)
                free -= task.width
        return found

    def pieces(self, chosen: Sequence[Task], pace: Pace) -> list[Piece]:
        """What the next call reads: the tokens written last, and as much of the prompts as there is time for."""
        written = [Piece(task, strand, (strand.token,)) for task in chosen for strand in task.strands]
        readers = [task for task in chosen if task.reading]
        read = self._shared(readers, self._budget(len(written), pace) if written else self.chunk) if readers else []
        if written:
            self._settle(len(written), sum(len(piece.ids) for piece in read), pace)
        return written + read

    def _ordinary(self, writers: int, pace: Pace) -> int:
        """Tokens of prompts that any call may hold."""
        return max(LEAST, int(pace.tokens(self.patience)) - writers)

    def _budget(self, writers: int, pace: Pace) -> int:
        """Tokens of prompts that the next call may hold, beside those of the writers."""
        most, each = self._ordinary(writers, pace), pace.seconds(1) - pace.seconds(0)
        # Nothing is spent below a half, so that there are few long calls instead of many that are a little longer.
        if each and self._saved >= self.stall / 2:
            most += int(self._saved / each)
        return min(self.chunk, most)

    def _settle(self, writers: int, read: int, pace: Pace) -> None:
        """Pay for what a call reads beyond the ordinary, or save something up."""
        beyond = read - self._ordinary(writers, pace)
        if beyond > 0:
            self._saved -= beyond * (pace.seconds(1) - pace.seconds(0))
        else:
            self._saved = min(self.stall, self._saved + self.saving * pace.seconds(writers + read))

    def _shared(self, readers: Sequence[Task], budget: int) -> list[Piece]:
        """The budget divided: everybody a share of one half, the rest to the first in line."""
        share = max(1, budget // (2 * len(readers)))
        wanted = [len(task.ahead(share)) for task in readers]
        rest = budget - sum(wanted)
        found = []
        for task, least in zip(readers, wanted, strict=True):
            ids = task.ahead(least + max(rest, 0))
            rest -= len(ids) - least
            found.append(Piece(task, None, ids))
        return found
