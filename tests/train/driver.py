"""A run in processes of its own, for tests: `python -m torch.distributed.run ... driver.py FOLDER JSON`, or alone.

The JSON holds settings of the recipe, "parallel", and "stop_after" for a number of steps. Prints the peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fledge.models import build, init_weights
from fledge.train.distributed import gather_full, join
from fledge.train.evaluate import Validation, ValidationText
from fledge.train.loop import train
from fledge.train.recipe import Recipe
from fledge.train.schedule import LearningRateSchedule

TEXT = np.tile(np.arange(1, 38, dtype=np.uint16), 6000)
BASE = Recipe(
    n_layer=2,
    n_embd=32,
    head_size=8,
    length=16,
    batch=8,
    micro_batch_size=4,
    steps=12,
    warmup_steps=2,
    max_lr=5e-3,
    dtype="float32",
    log_every=1,
    save_every=3,
    validate_every=6,
)


class Stopped(LearningRateSchedule):
    """The rates of another schedule, but fewer steps."""

    def __init__(self, whole: LearningRateSchedule, steps: int) -> None:
        super().__init__(whole.max_lr, whole.min_lr, whole.warmup_steps, steps)
        object.__setattr__(self, "whole", whole)

    def rate(self, step: int) -> float:
        """As if it went on."""
        rate: float = self.whole.rate(step)  # type: ignore[attr-defined]
        return rate


def main(folder: Path, settings: dict[str, object]) -> None:
    """One run."""
    torch.set_num_threads(1)
    parallel, stop_after = str(settings.pop("parallel", "ddp")), settings.pop("stop_after", None)
    recipe = replace(BASE, **settings)  # type: ignore[arg-type]
    config = recipe.model(40)
    model = build(config)
    init_weights(model, recipe.seed)
    validate = Validation([ValidationText("en", 60.0, list(range(1, 31))), ValidationText("de", 20.0, [5, 6, 7])])
    whole_run = recipe.settings()
    stopped = Stopped(whole_run.schedule, int(str(stop_after))) if stop_after else whole_run.schedule
    with join(parallel) as distributed:
        settings_now = replace(whole_run, schedule=stopped)
        train(
            model,
            recipe.batches(TEXT),
            settings_now,
            folder,
            validate,
            distributed=distributed,
            identity=recipe.identity,
        )
        weights = {name: gather_full(tensor.detach()) for name, tensor in model.named_parameters()}
        if distributed.is_main:
            torch.save(weights, folder / "weights.pt")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
