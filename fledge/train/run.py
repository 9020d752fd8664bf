"""A whole training run: from a recipe and a token store to the finished model file.

folder/run.json            all settings, and the identity of the data
folder/metrics.jsonl       losses, speed, validation
folder/last.pt             the checkpoint from which the run continues
folder/model.safetensors   the result, with its vocabulary and a record of the run
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge import checkpoint
from fledge.core.device import choose_device
from fledge.core.errors import CheckpointError, ConfigError, DataError, UsageError
from fledge.data.batches import Batch
from fledge.data.store import TOKENIZER, TokenStore, open_store
from fledge.models import BaseModel, ModelConfig, build, init_weights
from fledge.train.distributed import Distributed, gather_full
from fledge.train.evaluate import Validation, ValidationText
from fledge.train.loop import train
from fledge.train.memory import keep_freed_memory
from fledge.train.metrics import Report
from fledge.train.recipe import Recipe, get_settings

RESULT = "model.safetensors"
FINAL_BYTES = 1_000_000  # of each language, for the evaluation of the finished model


def run(
    recipe: Recipe,
    data: str | os.PathLike[str],
    folder: Path,
    report: Report = lambda line: None,
    *,
    start: str | os.PathLike[str] | None = None,
    distributed: Distributed = Distributed(),  # noqa: B008 - a value, never changed
    device: str | None = None,
) -> Path:
    """Train, or continue training, until the recipe's last step. Returns the path of the model file.

    start: a checkpoint with the initial weights. Raises subclasses of FledgeError for wrong settings, data or files.
    """
    keep_freed_memory()
    if recipe.micro_batch_size % distributed.world:
        raise ConfigError(
            f"micro_batch_size is {recipe.micro_batch_size}, but {distributed.world} processes share it; use a "
            f"multiple of {distributed.world} that divides batch = {recipe.batch}"
        )
    store = open_store(Path(data)).with_vocab_size(recipe.vocab_size)
    config = recipe.model(store.vocab_size)
    batches = _CheckedBatches(recipe, store, str(data))
    model = _create_model(config, recipe, store, start).to(_select_device(device, distributed))
    identity = {**recipe.identity, "data": store.sha256, "start": None if start is None else str(start)}
    texts = _read_validation_texts(store, str(data))
    train(
        model,
        batches,
        recipe.settings(),
        folder,
        Validation(texts, recipe.validate_bytes),
        report,
        distributed=distributed,
        identity=identity,
    )
    scores = Validation(texts, FINAL_BYTES)(model)
    tensors = {name: gather_full(tensor).cpu() for name, tensor in model.state_dict().items()}
    target = folder / RESULT
    if distributed.is_main:
        extra: dict[str, Any] = {
            "recipe": dataclasses.asdict(recipe),
            "data": store.sha256,
            "train_tokens": recipe.steps * recipe.batch * recipe.length,
            "bits_per_byte": {name.removeprefix("bpb_"): value for name, value in scores.items()},
        }
        checkpoint.save(target, config, tensors, tokenizer_spec=store.tokenizer_spec, extra=extra)
    distributed.wait()
    return target


def _select_device(name: str | None, distributed: Distributed) -> torch.device:
    device, _ = choose_device(name)
    if device.type == "cuda" and distributed.world > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def _create_model(
    config: ModelConfig, recipe: Recipe, store: TokenStore, start: str | os.PathLike[str] | None
) -> BaseModel:
    if start is None:
        model = build(config)
        init_weights(model, recipe.seed)
        return model
    loaded = checkpoint.load_model(start, dtype=torch.float32)
    _check_start(loaded, config, str(start))
    checkpoint.check_same_vocabulary(loaded.tokenizer_spec, store.tokenizer_spec, str(start))
    assert isinstance(loaded.model, BaseModel)
    return loaded.model.requires_grad_(True)


def _check_start(loaded: checkpoint.LoadedModel, config: ModelConfig, start: str) -> None:
    """Raise CheckpointError if the model differs from that of the recipe, with the settings that would match."""
    actual, expected = get_settings(loaded.config), get_settings(config)
    if actual["family"] is None:
        raise CheckpointError(
            f"{start} has version {loaded.config.version}, which recipes do not support; use `fledge tune full`"
        )
    different = [name for name in actual if actual[name] != expected.get(name)]
    if different:
        changes = " ".join(f"--set {name}={str(actual[name]).lower()}" for name in different)
        name = different[0]
        raise CheckpointError(
            f"{start} does not match the recipe: its {name} is {actual[name]}, that of the recipe "
            f"{expected.get(name)}; add {changes}"
        )
    if loaded.config.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{start} has {loaded.config.vocab_size} token rows, but the vocabulary of the store has "
            f"{config.vocab_size}; build the store with the model's {TOKENIZER} (in the config, `vocabulary`)"
        )
    if loaded.config != config:
        name = next(name for name, value in vars(config).items() if value != getattr(loaded.config, name))
        raise CheckpointError(
            f"no recipe describes {start}: its {name} is {getattr(loaded.config, name)}, that of a recipe "
            f"{getattr(config, name)}; use `fledge tune full`, which trains any model"
        )


class _CheckedBatches:
    """The batches of a store. The ids of each batch are checked against the model's vocabulary."""

    def __init__(self, recipe: Recipe, store: TokenStore, name: str) -> None:
        self.name, self.size = name, store.vocab_size
        try:
            self.batches = recipe.batches(store.tokens("train"))
        except UsageError as error:
            raise UsageError(
                f"{name}: {error}; use a smaller length (now {recipe.length}) or micro_batch_size "
                f"(now {recipe.micro_batch_size}), or more text"
            ) from None

    def __getitem__(self, number: int) -> Batch:
        """Batch `number`."""
        batch = self.batches[number]
        _check_ids(batch.idx, self.size, self.name)
        return batch


def _check_ids(ids: Tensor, size: int, store: str) -> None:
    """Raise DataError for ids outside the vocabulary."""
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= size:
        invalid = low if low < 0 else high
        raise DataError(
            f"{store} is damaged: it contains the token id {invalid}, but its vocabulary ends at {size - 1}"
        )


def _read_validation_texts(store: TokenStore, name: str) -> list[ValidationText]:
    if not store.has_part("validation"):
        return []
    texts = [ValidationText(span.language, span.bytes, span.ids.tolist()) for span in store.validation_documents()]
    for text in texts:
        if text.ids:
            _check_ids(torch.tensor(text.ids), store.vocab_size, name)
    return texts
