"""Calibration: the sums, their predictions, and invalid arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from random_checkpoints import random_checkpoint
from torch import Tensor

from fledge import checkpoint
from fledge.checkpoint.quantization.calibration import WINDOW, calibrate, measure
from fledge.checkpoint.quantization.quantizer import is_quantizable, quantize
from fledge.checkpoint.quantization.sensitivity import compute_cost
from fledge.core.errors import CheckpointError, UsageError
from fledge.kernels.rounding import quantize as round_weight
from fledge.models import BaseModel

TEXTS = ["The sea was calm. " * 20, "No wind. " * 40]


def make_model(version: str = "6.0") -> BaseModel:
    tensors = random_checkpoint(version, n_layer=2, n_embd=32, vocab_size=50)
    config = checkpoint.detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "random")
    model = checkpoint.assemble(config, tensors)
    assert isinstance(model, BaseModel)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Finch whose tokens are bytes."""
    path = tmp_path_factory.mktemp("models") / "bytes.pth"
    torch.save(random_checkpoint("6.0", n_layer=2, n_embd=16, vocab_size=256), path)
    return path


@pytest.mark.parametrize("version", ["4", "5.0", "5.2", "6.0"])
def test_every_matrix_of_every_version_is_measured(version: str) -> None:
    model = make_model(version)
    importance = measure(model, [[1, 2, 3, 4, 5], [6, 7]])
    weights = {name: weight for name, weight in model.named_parameters() if is_quantizable(name)}
    assert importance.keys() == weights.keys()
    for name, weight in weights.items():
        assert importance[name].outputs.shape == weight.shape[:1] and importance[name].inputs.shape == weight.shape[1:]
        assert bool((importance[name].inputs >= 0).all()) and float(importance[name].outputs.sum()) > 0, name
    assert not any(module._forward_hooks for module in model.modules())


def test_the_sums_follow_the_definition() -> None:
    """Compare with the gradients of autograd for each token alone, with tokens sampled in the same order."""
    model, ids = make_model(), [1, 2, 3, 4, 5, 6]
    importance = measure(model, [ids])["head.weight"]
    inputs_seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _module, inputs: inputs_seen.append(inputs[0].detach()[0]))
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids]))
    hook.remove()
    probabilities = torch.softmax(logits[0], -1)
    sampled = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    # The gradient with respect to the outputs of the head.
    gradient = probabilities - torch.nn.functional.one_hot(sampled, probabilities.shape[1])
    assert_close_relative(importance.inputs, inputs_seen[0].square().mean(0), MODEL_TOLERANCE, "inputs")
    assert_close_relative(importance.outputs, gradient.square().mean(0), MODEL_TOLERANCE, "outputs")


def test_windows_carry_the_state() -> None:
    model = make_model()
    ids = torch.randint(0, 50, (WINDOW + 20,)).tolist()
    importance = measure(model, [ids])["blocks.1.ffn.value.weight"]
    inputs_seen: list[Tensor] = []
    model.blocks[1].ffn.value.register_forward_pre_hook(
        lambda _module, inputs: inputs_seen.append(inputs[0].detach()[0])
    )
    with torch.no_grad():
        model(torch.tensor([ids]))
    assert_close_relative(importance.inputs, inputs_seen[0].square().mean(0), MODEL_TOLERANCE, "inputs")


def test_the_formula_predicts_the_cost_of_rounding() -> None:
    """Compare measured and predicted KL for a head rounded to 4 bits."""
    model = make_model()
    ids = torch.randint(0, 50, (1, 400), generator=torch.Generator().manual_seed(3))
    importance = measure(model, ids.tolist())
    for name in ("head.weight", "blocks.1.ffn.key.weight", "blocks.0.att.gate.weight"):
        weight = dict(model.named_parameters())[name]
        with torch.no_grad():
            before = torch.log_softmax(model(ids)[0][0], -1)
            original = weight.clone()
            matrix, _ = round_weight(weight, "int4")
            weight.copy_(matrix.dequantize())
            after = torch.log_softmax(model(ids)[0][0], -1)
            weight.copy_(original)
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        assert 0.6 < compute_cost(weight.detach(), matrix, importance[name]) / kl < 1.6, name


def test_calibration_is_repeatable_and_reports_progress(source: Path) -> None:
    calls: list[tuple[int, int]] = []
    importance = calibrate(source, TEXTS, tokens=300, report=lambda *call: calls.append(call))
    assert calls[-1] == (300, 300) and "head.weight" in importance
    repeated = calibrate(source, TEXTS, tokens=300)
    assert all(torch.equal(importance[name].outputs, repeated[name].outputs) for name in importance)


def test_invalid_arguments_are_rejected(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text to calibrate with"):
        calibrate(source, [""])
    quantize(source, tmp_path / "q.safetensors", "int8")
    with pytest.raises(CheckpointError, match="is already quantized"):
        calibrate(tmp_path / "q.safetensors", TEXTS)


def test_hooks_are_removed_after_an_error() -> None:
    model: Any = make_model()
    with pytest.raises(Exception, match="token id 99"):
        measure(model, [[1, 99]])
    assert not any(module._forward_hooks for module in model.modules())
