"""Transformer checkpoints: writing, reading, running, and errors for features of RWKV only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fledge
from fledge.checkpoint import convert, detect, get_expected_shapes, inspect, load, load_model, merge_tuned_state, save
from fledge.checkpoint.quantization.calibration import calibrate
from fledge.checkpoint.quantization.quantizer import quantize
from fledge.core.errors import CheckpointError, FledgeError, UnsupportedError, UsageError
from fledge.models import KvState, ModelConfig, Transformer, build, init_weights
from fledge.models.native_model import why_not_native

CONFIG = ModelConfig("llama", 256, n_layer=2, n_embd=24, dim_att=30, dim_ffn=40, n_head=3, norm_eps=1e-6)


def make_weights() -> dict[str, Tensor]:
    model = build(CONFIG)
    init_weights(model, 1)
    return model.state_dict()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save(path, CONFIG, make_weights(), extra={"steps": 3})
    return path


def test_the_table_agrees_with_the_model() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make_weights().items()}
    assert shapes == get_expected_shapes(CONFIG) and detect(shapes, heads=3).n_head == 3
    with pytest.raises(CheckpointError, match=r"x\.pth is a transformer without a record of its heads"):
        detect(shapes, "x.pth")
    with pytest.raises(CheckpointError, match=r"not a complete Transformer llama .* missing: blocks\.1\.att\.key"):
        detect({name: shape for name, shape in shapes.items() if name != "blocks.1.att.key.weight"}, "x", 3)
    with pytest.raises(CheckpointError, match="contradict each other: n_head is 4"):
        detect(shapes, "x", 4)


def test_a_saved_checkpoint_is_loaded_exactly(file: Path) -> None:
    config, tensors = load(file)
    assert config == CONFIG and list(tensors) == list(get_expected_shapes(CONFIG))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in make_weights().items())
    for options in ({}, {"pack": True}, {"dtype": torch.bfloat16}):
        model = load_model(file, **options).model  # type: ignore[arg-type]
        assert isinstance(model, Transformer) and not model.training
    info = inspect(file)
    rows = dict(info.to_rows())
    assert info.parameters == sum(tensor.numel() for tensor in make_weights().values())
    assert rows["state"] == f"{4 * 2 * 2 * 30} bytes for each token read"
    assert rows["model"] == "Transformer, version llama" and info.flops_per_token == 2 * info.parameters


def test_a_transformer_generates_text(file: Path) -> None:
    llm = fledge.load(file)
    completion = llm.generate("abc", max_tokens=12, seed=1)
    assert completion.prompt_tokens == 3 and isinstance(completion.state, KvState)
    assert completion.text == fledge.load(file, pack=False).generate("abc", max_tokens=12, seed=1).text
    # A state can be used several times. The final state has read the prompt and the generated tokens.
    state = llm.read("ab")
    for _ in range(2):
        assert llm.generate("c", state=state, max_tokens=12, seed=1).text == completion.text
    assert completion.state.end.tolist() == [[3 + len(completion.ids)]]
    assert llm.logprobs("xyz", context="abc").total < 0


def test_features_of_rwkv_only_are_rejected(file: Path, tmp_path: Path) -> None:
    def merge_state() -> Any:
        return merge_tuned_state(CONFIG, make_weights(), {}, "s.pth")

    for call, error, message in (
        (
            lambda: save(tmp_path / "m.pth", CONFIG, make_weights()),
            UsageError,
            "cannot hold the number of heads of a transformer",
        ),
        (lambda: convert(file, tmp_path / "m.pth"), UnsupportedError, "only a .safetensors can hold, not a pth"),
        (lambda: convert(file, tmp_path / "m.gguf"), UnsupportedError, "only a .safetensors can hold, not a gguf"),
        (lambda: convert(file, tmp_path / "folder"), UnsupportedError, "only a .safetensors can hold, not a hf"),
        (lambda: quantize(file, tmp_path / "q.safetensors", "int8"), UnsupportedError, "only RWKV models can be"),
        (lambda: calibrate(str(file), ["some text"]), UnsupportedError, "only RWKV models can be quantized"),
        (lambda: fledge.load(file, quant="int8"), UnsupportedError, "only RWKV models can be quantized"),
        (merge_state, CheckpointError, "cannot be used with a transformer, which has no matrix state"),
    ):
        with pytest.raises(FledgeError, match=message) as raised:
            call()
        assert isinstance(raised.value, error) and "\n" not in str(raised.value)
    assert why_not_native(CONFIG) == "the native library runs RWKV only, not a transformer"
    convert(file, tmp_path / "copy.safetensors")
    assert load(tmp_path / "copy.safetensors")[0] == CONFIG
