"""A recipe, a token store and a folder: the whole run, from the first weights to the finished model file.

folder/run.json          every setting, and the data's identity
folder/metrics.jsonl     losses, speed, validation
folder/last.pt           the checkpoint to continue from
folder/model.safetensors the result, with its vocabulary and a record of the run
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
from fledge.train.distributed import Distributed, whole
from fledge.train.evaluate import Validation, ValidationText
from fledge.train.loop import train
from fledge.train.memory import keep_freed_memory
from fledge.train.metrics import Report
from fledge.train.recipe import Recipe, settings_of

RESULT = "model.safetensors"
FINAL_BYTES = 1_000_000  # of each language, for the evaluation of the finished model


def run(
    recipe: Recipe,
    data: str | os.PathLike[str],
    folder: Path,
    report: Report = lambda line: None,
    *,
    start: str | os.PathLike[str] | None = None,
    team: Distributed = Distributed(),  # noqa: B008 - a value, never changed
    device: str | None = None,
) -> Path:
    """Train, or continue training, until the recipe's last step. Returns the path of the model file.

    start: a checkpoint with the initial weights. Raises subclasses of FledgeError for wrong settings, data or files.
    """
    keep_freed_memory()
    if recipe.micro_batch_size % team.world:
        raise ConfigError(
            f"micro_batch_size is {recipe.micro_batch_size}, but {team.world} processes share it; use a multiple of "
            f"{team.world} that divides batch = {recipe.batch}"
        )
    store = open_store(Path(data)).with_vocab_size(recipe.vocab_size)
    config = recipe.model(store.vocab_size)
    batches = _Checked(recipe, store, str(data))
    where = _device(device, team)
    model = _first_weights(config, recipe, store, start).to(where)
    identity = {**recipe.identity, "data": store.sha256, "start": None if start is None else str(start)}
    texts = _texts(store, str(data))
    train(
        model,
        batches,
        recipe.settings(),
        folder,
        Validation(texts, recipe.validate_bytes),
        report,
        team=team,
        identity=identity,
    )
    scores = Validation(texts, FINAL_BYTES)(model)
    tensors = {name: whole(tensor).cpu() for name, tensor in model.state_dict().items()}
    target = folder / RESULT
    if team.is_main:
        extra: dict[str, Any] = {
            "recipe": dataclasses.asdict(recipe),
            "data": store.sha256,
            "train_tokens": recipe.steps * recipe.batch * recipe.length,
            "bits_per_byte": {name.removeprefix("bpb_"): value for name, value in scores.items()},
        }
        checkpoint.save(target, config, tensors, tokenizer_spec=store.tokenizer_spec, extra=extra)
    team.wait()
    return target


def _device(device: str | None, team: Distributed) -> torch.device:
    chosen, _ = choose_device(device)
    if chosen.type == "cuda" and team.world > 1:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    return chosen


def _first_weights(
    config: ModelConfig, recipe: Recipe, store: TokenStore, start: str | os.PathLike[str] | None
) -> BaseModel:
    if start is None:
        model = build(config)
        init_weights(model, recipe.seed)
        return model
    found = checkpoint.load_model(start, dtype=torch.float32)
    _check_start(found, config, str(start))
    checkpoint.check_same_vocabulary(found.tokenizer_spec, store.tokenizer_spec, str(start))
    assert isinstance(found.model, BaseModel)
    return found.model.requires_grad_(True)


def _check_start(found: checkpoint.LoadedModel, config: ModelConfig, start: str) -> None:
    """Raise CheckpointError for a model of another shape, with the settings that would give this shape."""
    have, want = settings_of(found.config), settings_of(config)
    if have["family"] is None:
        raise CheckpointError(
            f"{start} is of version {found.config.version}, which no recipe has; `fledge tune full` trains it"
        )
    differ = [name for name in have if have[name] != want.get(name)]
    if differ:
        changes = " ".join(f"--set {name}={str(have[name]).lower()}" for name in differ)
        there, here = have[differ[0]], want.get(differ[0])
        raise CheckpointError(
            f"{start} is no model of this recipe: {differ[0]} is {there} there and {here} here; it would be with "
            f"{changes}"
        )
    if found.config.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{start} has {found.config.vocab_size} token rows, the store a vocabulary of {config.vocab_size}; build "
            f"the store with the {TOKENIZER} of the model's own (in the config, `vocabulary`)"
        )
    if found.config != config:
        name = next(name for name, value in vars(config).items() if value != getattr(found.config, name))
        raise CheckpointError(
            f"{start} is no model that a recipe can describe: its {name} is {getattr(found.config, name)}, a recipe's "
            f"{getattr(config, name)}; `fledge tune full` trains any model"
        )


class _Checked:
    """The rows of a store. The ids of each batch are checked against the model's vocabulary."""

    def __init__(self, recipe: Recipe, store: TokenStore, name: str) -> None:
        self.name, self.size = name, store.vocab_size
        try:
            self.batches = recipe.batches(store.tokens("train"))
        except UsageError as error:
            raise UsageError(
                f"{name}: {error}; use a smaller length (now {recipe.length}) or micro_batch_size "
                f"(now {recipe.micro_batch_size}), or more "
                "text"
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
        wrong = low if low < 0 else high
        raise DataError(f"{store} is damaged: it holds the token id {wrong}, and its vocabulary ends at {size - 1}")


def _texts(store: TokenStore, name: str) -> list[ValidationText]:
    if not store.has_part("validation"):
        return []
    found = [ValidationText(span.language, span.bytes, span.ids.tolist()) for span in store.validation_documents()]
    for text in found:
        if text.ids:
            _check_ids(torch.tensor(text.ids), store.vocab_size, name)
    return found
