"""A recipe, a token store and a folder: the whole run, from the first weights to the finished model file.

folder/run.json          every setting, and the data's identity
folder/metrics.jsonl     losses, speed, validation
folder/last.pt           the checkpoint to go on from
folder/model.safetensors the result, with its vocabulary and where it comes from
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from fledge import checkpoint
from fledge.core.device import choose_device
from fledge.core.errors import CheckpointError
from fledge.data.store import Store, open_store
from fledge.models import ModelConfig, Trunk, build, init_weights
from fledge.train.loop import train
from fledge.train.memory import keep_freed_memory
from fledge.train.meter import Report
from fledge.train.recipe import Recipe
from fledge.train.score import Text, Validation
from fledge.train.team import Team, whole

RESULT = "model.safetensors"
FINAL_BYTES = 1_000_000  # a language, of which the finished model is asked


def run(
    recipe: Recipe,
    data: str | os.PathLike[str],
    folder: Path,
    report: Report = lambda line: None,
    *,
    start: str | os.PathLike[str] | None = None,
    team: Team = Team(),  # noqa: B008 - a value, never changed
    device: str | None = None,
) -> Path:
    """Train, or go on training, until the recipe's last step; returns the model file.

    start: a checkpoint to begin from in place of fresh weights. Raises FledgeError's kinds as its parts do.
    """
    keep_freed_memory()
    store = open_store(Path(data)).with_rows(recipe.vocab_size)
    config = recipe.model(store.vocab_size)
    where = _device(device, team)
    model = _first_weights(config, recipe, store, start).to(where)
    identity = {**recipe.identity, "data": store.sha256, "start": None if start is None else str(start)}
    texts = _texts(store)
    train(
        model,
        recipe.batches(store.tokens("train")),
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
    if team.leads:
        extra: dict[str, Any] = {
            "recipe": dataclasses.asdict(recipe),
            "data": store.sha256,
            "train_tokens": recipe.steps * recipe.batch * recipe.length,
            "bits_per_byte": {name.removeprefix("bpb_"): value for name, value in scores.items()},
        }
        checkpoint.save(target, config, tensors, tokenizer_spec=store.tokenizer_spec, extra=extra)
    team.wait()
    return target


def _device(device: str | None, team: Team) -> torch.device:
    chosen, _ = choose_device(device)
    if chosen.type == "cuda" and team.world > 1:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    return chosen


def _first_weights(config: ModelConfig, recipe: Recipe, store: Store, start: str | os.PathLike[str] | None) -> Trunk:
    if start is None:
        model = build(config)
        init_weights(model, recipe.seed)
        return model
    found = checkpoint.load_model(start, dtype=torch.float32)
    if found.config != config:
        differ = [name for name, value in vars(config).items() if value != getattr(found.config, name)]
        raise CheckpointError(
            f"{start} is no model of this recipe: {differ[0]} is {getattr(found.config, differ[0])} there and "
            f"{getattr(config, differ[0])} here"
        )
    checkpoint.check_same_vocabulary(found.tokenizer_spec, store.tokenizer_spec, str(start))
    assert isinstance(found.model, Trunk)
    return found.model.requires_grad_(True)


def _texts(store: Store) -> list[Text]:
    if not store.has("validation"):
        return []
    return [Text(span.language, span.bytes, span.ids.tolist()) for span in store.documents()]
