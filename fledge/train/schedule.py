"""The learning rate as a pure function of progress: linear warm-up, then a cosine (paper, appendix H)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fledge.core.errors import ConfigError

MAX_LEARNING_RATE = 10.0


@dataclass(frozen=True)
class LearningRateSchedule:
    """Warm-up from 1% of `max_lr` during `warmup_steps` steps, then a cosine that reaches `min_lr` at step `steps`."""

    max_lr: float
    min_lr: float
    warmup_steps: int
    steps: int

    def __post_init__(self) -> None:
        # Adam changes each number by about the learning rate. Numbers of states are up to about 100.
        if not 0 < self.min_lr <= self.max_lr <= MAX_LEARNING_RATE:
            raise ConfigError(
                f"the learning rate would fall from {self.max_lr:g} to {self.min_lr:g}; "
                f"it needs 0 < min_lr <= max_lr <= {MAX_LEARNING_RATE:g}"
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps} and steps {self.steps}; a run needs 0 <= warmup_steps < steps"
            )

    def rate(self, step: int) -> float:
        """The learning rate of step number `step` (from 0); `min_lr` from step `steps` on."""
        if step < self.warmup_steps:
            return self.max_lr * (0.01 + 0.99 * step / self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / (self.steps - self.warmup_steps))
        return self.min_lr + (self.max_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
