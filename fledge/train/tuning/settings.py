"""The settings of a fine-tuning run: which parameters each mode trains, and the learning rates.

    mode    trained                                              learning rate     result
    full    all parameters                                       1e-5, constant    model.safetensors
    lora    factors of the selected matrices, and the parameters
            that match `parts`                                   2e-4 to 2e-5      adapter.safetensors
    state   the initial state only                               1 to 0.01         state.safetensors, state.pth

The base is never changed. Trained parameters are float32; the others keep their dtype.

The learning rate of the state is the official one. It is much higher than for weights because Adam changes each number
by about the learning rate, and the numbers of a state are in the tens. On the bundled model in float32, 40 steps at
rate 1 bring the root mean square of the state to 7 and the loss on held-out answers from 4.8 to 2.3, without a spike.
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
"""The learning rates of each mode: after the warm-up and at the end."""

MAX_RANK = 4096  # the width of a model with 7 billion parameters
MAX_COUNT = 2**31 - 1  # of batches, tokens and steps; a larger value is a typing error
MAX_EPOCHS = 1e6


@dataclass(frozen=True)
class LoraSettings:
    """The matrices that get factors, and the parameters that are fully trained as well."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    parts: tuple[str, ...] = ()  # parameters whose name contains one of these; RWKV-PEFT's default is ("time", "ln")

    def __post_init__(self) -> None:
        if self.rank > MAX_RANK:
            raise ConfigError(f"rank is {self.rank}; it must be from 1 to {MAX_RANK}, and 8 to 64 is usual")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha is {self.alpha:g}; it must be a number above 0, and twice the rank is usual")


@dataclass(frozen=True)
class TuneSettings:
    """The settings of a fine-tuning run, without the base, the data and the folder."""

    mode: str  # one of RATES
    batch: int = 4  # examples per micro-batch
    accumulate: int = 1  # micro-batches per step
    length: int = 1024  # the maximum of tokens per example; the rest is cut off
    epochs: float = 3.0
    steps: int | None = None  # replaces `epochs`
    rate: float | None = None  # None: the default of the mode
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
            if (getattr(self, name) or 0) > MAX_COUNT:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from 1 to {MAX_COUNT}")
        if self.epochs > MAX_EPOCHS:
            raise ConfigError(f"epochs are {self.epochs:g}; they must be at most {MAX_EPOCHS:g}")

    def count_steps(self, per_epoch: int) -> int:
        """Number of steps of the run, for this number of micro-batches per epoch."""
        return self.steps or max(1, round(self.epochs * per_epoch / self.accumulate))

    def schedule(self, steps: int) -> LearningRateSchedule:
        """The learning rate of every step. The warm-up takes at most a tenth of the steps."""
        default_max, default_min = RATES[self.mode]
        max_lr = default_max if self.rate is None else self.rate
        min_lr = default_min * max_lr / default_max if self.final_rate is None else self.final_rate
        return LearningRateSchedule(max_lr, min_lr, min(self.warmup_steps, steps // 10), steps)


def build_trainable_model(
    base: Checkpoint,
    settings: TuneSettings,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> BaseModel:
    """The model of a checkpoint. The parameters that the mode trains are float32 and require a gradient.

    dtype: of the matrices that are not trained; None: as in the file. The tensors of `base` are not changed.
    """
    if base.quantized:
        raise UsageError(f"{base.path} is quantized and cannot be tuned; give the dense model")
    config, tensors = base.config, base.tensors
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
            # Copied, because it may share memory with the file.
            parameter.data = parameter.detach().clone().float()
            parameter.requires_grad_()
    _check_parts(model, settings)
    return model


def _is_trained(name: str, settings: TuneSettings) -> bool:
    if settings.mode == "lora":
        return name.endswith((".lora_A", ".lora_B")) or any(part in name for part in settings.lora.parts)
    return settings.mode == "full" or name.endswith(".att.time_state")


def _check_parts(model: nn.Module, settings: TuneSettings) -> None:
    """Raise UsageError for an entry of `parts` that matches no parameter."""
    names = [name for name, _ in model.named_parameters()]
    for part in settings.lora.parts if settings.mode == "lora" else ():
        if not part or not any(part in name for name in names):
            raise UsageError(f"no parameter has {part!r:.40} in its name; remove it from --train-parts")


def build_train_settings(settings: TuneSettings, steps: int, compute_dtype: torch.dtype | None = None) -> TrainSettings:
    """The settings of the training loop. There is no weight decay, because it would shrink the weights of the base."""
    return TrainSettings(
        settings.schedule(steps),
        AdamSettings(weight_decay=0.0),
        accumulate=settings.accumulate,
        compute_dtype=compute_dtype,
        log_every=max(1, min(10, steps // 10)),
        save_every=max(1, min(50, steps // 10)),
        validate_every=max(1, min(100, steps)),
    )
