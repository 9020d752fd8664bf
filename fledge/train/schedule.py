"""The learning rate as a pure function of progress: linear warm-up, then a cosine (paper, appendix H)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fledge.core.errors import ConfigError

HIGHEST = 10.0


@dataclass(frozen=True)
class LearningRateSchedule:
    """Warm up from 1 % of `peak` over `warmup` steps, then fall to `final` along a cosine by step `steps`."""

    peak: float
    final: float
    warmup: int
    steps: int

    def __post_init__(self) -> None:
        # Adam moves each number by about the rate: even a state, which holds tens, can learn nothing at a higher one.
        if not 0 < self.final <= self.peak <= HIGHEST:
            raise ConfigError(
                f"the learning rate would fall from {self.peak:g} to {self.final:g}; it needs 0 < final <= peak <= "
                f"{HIGHEST:g}"
            )
        if not 0 <= self.warmup < self.steps:
            raise ConfigError(f"warmup is {self.warmup} and steps {self.steps}; a run needs 0 <= warmup < steps")

    def rate(self, step: int) -> float:
        """The learning rate of step number `step` (from 0); `final` from step `steps` on."""
        if step < self.warmup:
            return self.peak * (0.01 + 0.99 * step / self.warmup)
        share = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * share))
