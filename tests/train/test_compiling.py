"""torch.compile, which needs a C++ compiler here: the same losses as without it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from test_training import TEXT

from fledge.data.windows import Windows
from fledge.models import ModelConfig, build, init_weights
from fledge.train.distributed import Distributed
from fledge.train.loop import TrainSettings, compute_gradients, prepare
from fledge.train.schedule import LearningRateSchedule

SETTINGS = TrainSettings(LearningRateSchedule(1e-3, 1e-4, 1, 9), window=16)
ONE_SHAPE, TWO_SHAPES = 16, 24  # tokens of a row, read by that window
FAMILIES = {"finch": ModelConfig.finch, "eagle": ModelConfig.eagle, "transformer": ModelConfig.transformer}


def loss_and_gradients(family: str, length: int, *, compile: bool) -> tuple[float, dict[str, torch.Tensor]]:
    torch.compiler.reset()
    model = build(FAMILIES[family](2, 32, head_size=16, vocab_size=40))
    init_weights(model, 0)
    prepare(model, replace(SETTINGS, compile=compile))
    loss, _ = compute_gradients(model, [Windows(TEXT, length, 3, 0)[0]], SETTINGS, Distributed())
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")  # the compiler gives many of its own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here")
@pytest.mark.parametrize(
    ("family", "length"),
    [
        ("finch", ONE_SHAPE),
        *(pytest.param(family, TWO_SHAPES, marks=pytest.mark.slow) for family in FAMILIES),  # a minute each
    ],
)
def test_compiled_blocks_give_the_same_loss_and_gradients(family: str, length: int) -> None:
    compiled, ours = loss_and_gradients(family, length, compile=True)
    loss, expected = loss_and_gradients(family, length, compile=False)
    assert compiled == pytest.approx(loss, rel=MODEL_TOLERANCE)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close_relative(ours[name], gradient, MODEL_TOLERANCE, name)
