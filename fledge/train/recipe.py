"""A recipe: all settings of a training run except the data and the folder, as one flat, frozen dataclass.

Recipes are made by functions without arguments. Those of `builtin_recipes.py` are used by name, others as
`file.py:function`. An unknown setting or a value of a wrong type is an error.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fledge.core.config import check_keys, parse_text
from fledge.core.errors import ConfigError
from fledge.data.batches import Batches
from fledge.data.windows import OfficialWindows, Tokens, Windows
from fledge.models import ModelConfig
from fledge.train.loop import TrainSettings
from fledge.train.optim import AdamSettings
from fledge.train.schedule import LearningRateSchedule

FAMILIES: dict[str, Callable[..., ModelConfig]] = {
    "finch": ModelConfig.finch,
    "eagle": ModelConfig.eagle,
    "rwkv4": ModelConfig.rwkv4,
    "transformer": ModelConfig.transformer,
}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
ORDERS = ("shuffled", "official")
SIZES = (
    "n_layer",
    "n_embd",
    "head_size",
    "vocab_size",
    "length",
    "batch",
    "micro_batch_size",
    "steps",
    "validate_bytes",
)
LARGEST = {"seed": 2**63 - 1, **dict.fromkeys(SIZES, 2**31 - 1), "n_layer": 1000, "n_embd": 2**16, "vocab_size": 2**20}
"""Limits that catch typing errors before they allocate all memory."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. The defaults, including the learning rates, are for a small Finch."""

    family: str = "finch"  # one of FAMILIES; "transformer" is a baseline with the size of the Finch
    n_layer: int = 6
    n_embd: int = 256
    head_size: int = 64
    vocab_size: int = 0  # 0: that of the data
    scaled_keys: bool = False  # Finch's keys times exp(min(d, 0)): against loss spikes, but only Fledge reads the model

    length: int = 512  # tokens of a row
    batch: int = 16  # rows of a step, over all processes
    micro_batch_size: int = 8  # rows of a forward pass, over all processes; divides batch
    order: str = "shuffled"  # order of the rows; "official" is that of RWKV-LM
    reset_at_document: bool = False  # start from an empty state at every document, not only at every row
    window: int | None = None  # tokens of a forward pass; the state is passed on along the row; None: the whole row
    tbptt_windows: int = 1  # windows that a gradient flows back through
    seed: int = 1

    steps: int = 1000
    max_lr: float = 1e-3  # learning rate
    min_lr: float = 1e-4
    warmup_steps: int = 50  # steps
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    weight_decay: float = 0.1
    clip: float = 1.0  # maximum norm of the gradient

    dtype: str = "bfloat16"  # dtype of the matrix products; the weights, the state and everything else are float32
    activation_checkpointing: bool = False  # recompute blocks for the gradient: less memory, a third more time
    compile: bool = False

    log_every: int = 10  # steps
    save_every: int = 100
    validate_every: int = 200
    validate_bytes: int = 20_000  # for each language, at most

    def __post_init__(self) -> None:
        for name, known in (("family", FAMILIES), ("dtype", DTYPES), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(known)}")
        for name, most in LARGEST.items():
            least = 0 if name in ("seed", "vocab_size") else 1
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from {least} to {most}")
        if self.batch % self.micro_batch_size:
            raise ConfigError(f"micro_batch_size is {self.micro_batch_size}; it must divide batch = {self.batch}")
        self.settings()

    def model(self, vocab_size: int) -> ModelConfig:
        """The model for data with this vocabulary size."""
        if self.vocab_size and self.vocab_size < vocab_size:
            raise ConfigError(f"vocab_size is {self.vocab_size}, but the data has ids up to {vocab_size - 1}")
        sizes = {} if self.family == "rwkv4" else {"head_size": self.head_size}
        config = FAMILIES[self.family](self.n_layer, self.n_embd, self.vocab_size or vocab_size, **sizes)
        return dataclasses.replace(config, scaled_keys=self.scaled_keys)

    def batches(self, tokens: Tokens) -> Batches:
        """The rows, in order."""
        if self.order == "official":
            return OfficialWindows(tokens, self.length, self.micro_batch_size, reset_at_document=self.reset_at_document)
        return Windows(tokens, self.length, self.micro_batch_size, self.seed, reset_at_document=self.reset_at_document)

    def settings(self) -> TrainSettings:
        """The settings of the training loop."""
        return TrainSettings(
            schedule=LearningRateSchedule(self.max_lr, self.min_lr, self.warmup_steps, self.steps),
            adam=AdamSettings(self.beta1, self.beta2, self.eps, self.weight_decay),
            accumulate=self.batch // self.micro_batch_size,
            compute_dtype=DTYPES[self.dtype],
            **{name: getattr(self, name) for name in SHARED},
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that must not change when a run continues."""
        return {name: getattr(self, name) for name in IDENTITY}

    def changed(self, settings: Mapping[str, str]) -> Recipe:
        """This recipe with settings given as text. Raises ConfigError for an unknown one or a wrong value."""
        check_keys(Recipe, settings)
        kinds = typing.get_type_hints(Recipe)
        values = {name: parse_text(kinds[name], text, name) for name, text in settings.items()}
        return dataclasses.replace(self, **values)


SHARED = (
    "clip",
    "window",
    "tbptt_windows",
    "activation_checkpointing",
    "compile",
    "log_every",
    "save_every",
    "validate_every",
)
"""Settings that the loop has under the same name."""

HOW = ("activation_checkpointing", "compile", "save_every")
RATES = ("max_lr", "min_lr", "warmup_steps", "beta1", "beta2", "eps", "weight_decay", "clip")
"""Settings that may change when a run continues, for example after a loss spike."""

IDENTITY = tuple(field.name for field in dataclasses.fields(Recipe) if field.name not in HOW + RATES)


def get_settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of a recipe that define the model, without the vocabulary; family None: no recipe has this model."""
    families = {"4": "rwkv4", "5.2": "eagle", "6.0": "finch", "llama": "transformer"}
    sizes = {"n_layer": config.n_layer, "n_embd": config.n_embd}
    if config.n_head:
        sizes["head_size"] = config.head_size
    return {"family": families.get(config.version), **sizes, "scaled_keys": config.scaled_keys}
