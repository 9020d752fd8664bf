"""Fine-tuning: which parameters of a checkpoint are trained in each mode, and at which rates.

    mode    trained                                                    learning rate     written
    full    everything                                                 1e-5, constant    model.safetensors
    lora    factors on the chosen matrices, and whole parts if asked   2e-4 to 2e-5      adapter.safetensors
    state   the state that texts begin from, nothing else              1 to 0.01         state.safetensors, state.pth

The base is never written to. What is trained is float32; what is not keeps the dtype it was loaded in. The rate of the
state is the official one. It would destroy weights, but Adam moves each number by about the rate whatever the gradient,
and a state that has read something holds numbers in the tens: on the bundled model, in float32, 40 steps at 1 bring the
state to a root mean square of 7 and the loss on unseen answers from 4.8 to 2.3, without a spike.
Not here: the run itself (tuning_run.py), reading examples (fledge.data.examples).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from fledge.checkpoint import Checkpoint, assemble, merge_tuned_state
from fledge.core.errors import ConfigError, UsageError
from fledge.models import BaseModel
from fledge.models.adapters import TARGETS, add_lora, init_factors, select_targets
from fledge.train.loop import TrainSettings
from fledge.train.optim import AdamSettings
from fledge.train.schedule import LearningRateSchedule

RATES = {"full": (1e-5, 1e-5), "lora": (2e-4, 2e-5), "state": (1.0, 0.01)}
"""Mode -> learning rate after the warm-up, and at the end."""

LARGEST_RANK = 4096  # as wide as a model of 7 billion
LARGEST = 2**31 - 1  # of what is counted: more is a slip of the finger, and a run that would never end
MOST_EPOCHS = 1e6


@dataclass(frozen=True)
class LoraSettings:
    """Which matrices get factors, and what is trained whole beside them."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    parts: tuple[str, ...] = ()  # parameters whose name contains one of these; RWKV-PEFT's default is ("time", "ln")

    def __post_init__(self) -> None:
        if self.rank > LARGEST_RANK:
            raise ConfigError(f"rank is {self.rank}; it must be from 1 to {LARGEST_RANK}, and 8 to 64 is usual")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha is {self.alpha:g}; it must be a number above 0, and twice the rank is usual")


@dataclass(frozen=True)
class TuneSettings:
    """One fine-tuning run, without base, data and folder."""

    mode: str  # one of RATES
    batch: int = 4  # examples of a micro-batch
    accumulate: int = 1  # micro-batches of a step
    length: int = 1024  # tokens of an example that are read
    epochs: float = 3.0
    steps: int | None = None  # in place of epochs
    rate: float | None = None  # None: the mode's own
    final_rate: float | None = None
    warmup_steps: int = 10  # steps
    seed: int = 0
    template: str = "world"
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        if self.mode not in RATES:
            raise ConfigError(f"mode {self.mode!r:.20} is unknown; choose {', '.join(RATES)}")
        if not 0 < self.epochs < math.inf or (self.steps is not None and self.steps < 1):
            raise ConfigError(f"epochs are {self.epochs:g} and steps {self.steps}; both must be above 0")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {2**63 - 1}")
        if self.batch < 1 or self.accumulate < 1:
            raise ConfigError(f"batch is {self.batch} and accumulate {self.accumulate}; both must be at least 1")
        for name in ("batch", "accumulate", "length", "steps"):
            if (getattr(self, name) or 0) > LARGEST:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from 1 to {LARGEST}")
        if self.epochs > MOST_EPOCHS:
            raise ConfigError(f"epochs are {self.epochs:g}; they must be at most {MOST_EPOCHS:g}")

    def count_steps(self, per_epoch: int) -> int:
        """Number of steps of the run, for this number of micro-batches per epoch."""
        return self.steps or max(1, round(self.epochs * per_epoch / self.accumulate))

    def schedule(self, steps: int) -> LearningRateSchedule:
        """The learning rate of every step; a run of few steps warms up over a tenth of them."""
        rate = RATES[self.mode][0] if self.rate is None else self.rate
        usual = RATES[self.mode][1] * rate / RATES[self.mode][0]  # the mode's own ratio
        final = usual if self.final_rate is None else self.final_rate
        return LearningRateSchedule(rate, final, min(self.warmup_steps, steps // 10), steps)


def tunable(
    found: Checkpoint,
    settings: TuneSettings,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> BaseModel:
    """The model of a checkpoint in which exactly what the mode trains requires a gradient, as float32.

    dtype: of the matrices that are not trained; None keeps the file's. The checkpoint's tensors stay as they are.
    """
    if found.quantized:
        raise UsageError(f"{found.path} is quantized and cannot be tuned; give the dense model")
    config, tensors = found.config, found.tensors
    if settings.mode == "state" and not config.tuned_state:
        shape = (config.n_head, config.head_size, config.head_size)
        zeros = {f"blocks.{layer}.att.time_state": torch.zeros(shape) for layer in range(config.n_layer)}
        config, tensors = merge_tuned_state(config, tensors, zeros, "a tuned state")
    model = assemble(config, tensors, device=device, dtype=torch.float32 if settings.mode == "full" else dtype)
    assert isinstance(model, BaseModel)
    model.requires_grad_(False)
    if settings.mode == "lora":
        names = select_targets([name for name, _ in model.named_parameters()], settings.lora.targets)
        add_lora(model, init_factors(model, names, settings.lora.rank, settings.lora.alpha, settings.seed))
    for name, parameter in model.named_parameters():
        if _is_trained(name, settings):
            # A copy: it may share memory with the file.
            parameter.data = parameter.detach().clone().float()
            parameter.requires_grad_()
    _check_parts(model, settings)
    return model


def _is_trained(name: str, settings: TuneSettings) -> bool:
    if settings.mode == "lora":
        return name.endswith((".lora_A", ".lora_B")) or any(part in name for part in settings.lora.parts)
    return settings.mode == "full" or name.endswith(".att.time_state")


def _check_parts(model: nn.Module, settings: TuneSettings) -> None:
    """Raise UsageError for a part that no parameter is called by."""
    names = [name for name, _ in model.named_parameters()]
    for part in settings.lora.parts if settings.mode == "lora" else ():
        if not part or not any(part in name for name in names):
            raise UsageError(f"no parameter has {part!r:.40} in its name, so it cannot be trained whole")


def train_settings(settings: TuneSettings, steps: int, compute_dtype: torch.dtype | None = None) -> TrainSettings:
    """What the loop is asked for. No weight decay: it would pull what is tuned away from what was learnt before."""
    return TrainSettings(
        settings.schedule(steps),
        AdamSettings(weight_decay=0.0),
        accumulate=settings.accumulate,
        compute_dtype=compute_dtype,
        log_every=max(1, min(10, steps // 10)),
        save_every=max(1, min(50, steps // 10)),
        validate_every=max(1, min(100, steps)),
    )
