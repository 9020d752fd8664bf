"""Fledge against rwkv.cpp: a trained RWKV-5.2 of its tests, and the logits stored beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close_relative

from fledge.checkpoint import assemble, load

pytestmark = pytest.mark.peer

PROMPT = [34, 105, 110]  # bytes, the model's vocabulary
GROUP_NORM_EPS = 1e-5  # rwkv.cpp's for RWKV-5, where official checkpoints need 64e-5
# The stored logits are float32 as well. On each side rounding is bounded by 3.7e-4 for 12 layers and sums of 256 terms
# (see closeness.py). The largest difference measured is 5.3e-7 of the largest logit.
TOLERANCE = 5e-6


@pytest.mark.parametrize("pieces", [[3], [1, 1, 1], [2, 1]], ids=str)
def test_trained_model_gives_the_expected_logits(shared: Path, pieces: list[int]) -> None:
    folder = shared / "models" / "tiny-eagle"
    if not folder.is_dir():
        pytest.skip("needs ../shared/models/tiny-eagle")
    expected = torch.from_numpy(np.fromfile(folder / "expected-logits.f32", dtype="<f4"))
    config, tensors = load(folder / "model.pth")
    model = assemble(dataclasses.replace(config, group_norm_eps=GROUP_NORM_EPS), tensors)
    state = None
    for piece in torch.tensor([PROMPT]).split(pieces, dim=1):
        with torch.no_grad():
            logits, state = model(piece, state)
    assert expected.shape == (256,)
    assert_close_relative(logits[0, -1], expected, TOLERANCE, "logits")
