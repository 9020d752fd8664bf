"""The transformer is trained like the other models: the loop, optimizer groups, bfloat16 products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fledge.data.windows import Windows
from fledge.models import ModelConfig, build, init_weights
from fledge.train.loop import TrainSettings, train
from fledge.train.optim import AdamSettings, parameter_groups
from fledge.train.schedule import LearningRateSchedule

CONFIG = ModelConfig.transformer(2, 32, vocab_size=40, head_size=8)


def test_matrices_decay_and_norms_do_not() -> None:
    model = build(CONFIG)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1)}
    norms = {f"blocks.{layer}.ln{norm}.weight" for layer in range(2) for norm in (1, 2)} | {"ln_out.weight"}
    assert groups == {"fast": set(), "rest": norms, "matrices": set(names.values()) - norms}
    assert "blocks.1.ffn.gate.weight" in groups["matrices"] and "emb.weight" in groups["matrices"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_loss_falls(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = build(CONFIG)
    init_weights(model, 0)
    settings = TrainSettings(
        LearningRateSchedule(1e-2, 1e-2, 0, 20), AdamSettings(eps=1e-8), compute_dtype=dtype, log_every=1
    )
    rows = Windows(np.tile(np.arange(1, 38, dtype=np.uint16), 40), length=32, batch=6, seed=0)
    lines: list[dict[str, float]] = []
    train(model, rows, settings, tmp_path, lambda model: {}, lines.append)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and 3.4 < losses[0] < 4.0 and losses[-1] < 0.3 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
