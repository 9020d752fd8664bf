"""Models from checkpoints: strictness, precision, shared memory and tuned states."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close_relative
from small_checkpoints import KINDS, are_equal, make_tensors, save_pth

from fledge.checkpoint import (
    assemble,
    convert,
    get_expected_shapes,
    load,
    load_model,
    load_tuned_state,
    merge_tuned_state,
    save,
)
from fledge.core.errors import CheckpointError, UsageError
from fledge.models import ModelConfig

REPO = Path(__file__).resolve().parents[2]
IDX = torch.tensor([[3, 1, 4, 1, 5]])


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is a Linear layer, the embedding or the head. The rule is independent of that in the loader."""
    layers = ("key", "value", "receptance", "gate", "output", "emb", "head")
    return name.endswith(".weight") and name.split(".")[-2] in layers


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_and_runs(kind: str, tmp_path: Path) -> None:
    loaded = load_model(save_pth(tmp_path, make_tensors(kind)))
    with torch.no_grad():
        logits, state = loaded.model(IDX)
    assert logits.shape == (1, 5, 37) and bool(logits.isfinite().all()) and state.batch == 1
    assert loaded.config == loaded.model.config and loaded.format == "pth" and not loaded.model.training


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_matrices_have_the_requested_dtype_and_others_are_float32(
    stored: torch.dtype, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model = load_model(save_pth(tmp_path, make_tensors("6.0 tuned", dtype=stored)), dtype=dtype).model
    matrix_dtype = dtype or (torch.float32 if stored == torch.float16 else stored)
    for name, weight in model.state_dict().items():
        assert weight.dtype == (matrix_dtype if is_matrix(name, weight) else torch.float32), name


def test_weights_keep_their_values_in_bfloat16(tmp_path: Path) -> None:
    tensors = make_tensors("6.0 in bfloat16")
    weights = load_model(save_pth(tmp_path, tensors)).model.state_dict()
    assert all(torch.equal(weights[name].float(), tensor.float()) for name, tensor in tensors.items())


def test_unchanged_weights_are_shared_not_copied(tmp_path: Path) -> None:
    config, tensors = load(save_pth(tmp_path, make_tensors("5.2")))
    model = assemble(config, tensors)
    assert all(weight.data_ptr() == tensors[name].data_ptr() for name, weight in model.state_dict().items())


def test_conversion_does_not_change_the_arguments(tmp_path: Path) -> None:
    tensors = make_tensors("6.0 in bfloat16", n_embd=64)  # a matrix is larger than a page
    config, mapped = load(save_pth(tmp_path, tensors))
    for source in (tensors, mapped):
        before = {name: tensor.clone() for name, tensor in source.items()}
        assemble(config, source, dtype=torch.float32)
        assert are_equal(before, source)


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_loading_in_another_dtype_peaks_near_the_size_of_the_model(name: str, tmp_path: Path) -> None:
    """Memory of the file is released as weights are converted, so that it does not add to the peak."""
    config = ModelConfig.finch(2, 1024, vocab_size=4096)
    shapes = get_expected_shapes(config)
    save(tmp_path / name, config, {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})
    small = save_pth(tmp_path, make_tensors("6.0"), "small.pth")
    code = """
import sys, torch
from pathlib import Path
from fledge.checkpoint import load_model
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
load_model(sys.argv[1], dtype=torch.float32)  # imports what it needs
before = peak()
model = load_model(sys.argv[2], dtype=torch.float32).model
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(small), str(tmp_path / name)]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    target = 4 * sum(torch.Size(shape).numel() for shape in shapes.values()) / 1024
    assert int(run.stdout) < 1.2 * target  # 1.5 if the file stayed in memory


def test_training_a_mapped_model_does_not_change_the_file(tmp_path: Path) -> None:
    path = save_pth(tmp_path, make_tensors("5.2"))
    before = path.read_bytes()
    model = load_model(path).model
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_other_dtypes_are_rejected(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not one of float32, bfloat16, float16"):
        load_model(save_pth(tmp_path, make_tensors("4")), dtype=dtype)


def test_the_logits_of_rwkv_cpp_are_reproduced(shared: Path, tmp_path: Path) -> None:
    """The stored logits were computed with a group-norm epsilon of 1e-5, which the header can record."""
    config, tensors = load(shared / "models/tiny-eagle/model.pth")
    save(tmp_path / "m.safetensors", replace(config, group_norm_eps=1e-5), tensors)
    expected = np.fromfile(shared / "models/tiny-eagle/expected-logits.f32", dtype="<f4")
    with torch.no_grad():
        logits, _ = load_model(tmp_path / "m.safetensors").model(torch.tensor([[34, 105, 110]]))
    # 12 layers and sums of 256 terms: rounding is bounded by 2 * 12 * 256 * 2**-24 = 3.7e-4 (see closeness.py).
    assert_close_relative(logits[0, -1], torch.from_numpy(expected), 5e-6, "logits")


@pytest.mark.parametrize("kind", ["5.2", "6.0"])
def test_a_tuned_state_is_used_dropped_or_replaced(kind: str, tmp_path: Path) -> None:
    tensors = make_tensors(f"{kind} tuned")
    state = {name: tensor for name, tensor in tensors.items() if name.endswith("time_state")}
    base = {name: tensor for name, tensor in tensors.items() if name not in state}
    with_state, without_state = save_pth(tmp_path, tensors, "whole.pth"), save_pth(tmp_path, base, "plain.pth")
    state_file = save_pth(tmp_path, {f"_forward_module.{name}": tensor for name, tensor in state.items()}, "state.pth")

    def logits(path: Path, **options: object) -> torch.Tensor:
        loaded = load_model(path, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            return loaded.model(IDX)[0]

    tuned, untuned = logits(with_state), logits(without_state)
    assert not torch.allclose(tuned, untuned)
    assert torch.equal(logits(with_state, tuned=False), untuned)
    assert torch.equal(logits(without_state, state_file=state_file), tuned)
    assert torch.equal(logits(with_state, tuned=False, state_file=with_state), tuned)


def test_the_tuned_state_of_the_dict_equals_that_of_the_file(tmp_path: Path) -> None:
    """The file and the dict have (H, V, K); the state of the model is the transpose."""
    tensors = make_tensors("6.0 tuned")
    state = load_tuned_state(save_pth(tmp_path, tensors))
    assert list(state) == [f"blocks.{layer}.att.time_state" for layer in range(3)]
    config, merged = merge_tuned_state(*load(save_pth(tmp_path, make_tensors("6.0"), "base.pth")), state)
    assert config.tuned_state and torch.equal(merged["blocks.1.att.time_state"], tensors["blocks.1.att.time_state"])
    initial_state = assemble(config, merged).initial_state(2)
    assert torch.equal(initial_state.wkv[1, 0], tensors["blocks.1.att.time_state"].transpose(1, 2))


def test_a_tuned_state_is_read_from_any_format(tmp_path: Path) -> None:
    tensors = make_tensors("6.0 tuned")
    convert(save_pth(tmp_path, tensors), tmp_path / "folder")
    assert are_equal(load_tuned_state(tmp_path / "folder"), load_tuned_state(tmp_path / "model.pth"))


def test_tuned_states_of_other_models_are_rejected(tmp_path: Path) -> None:
    state = load_tuned_state(save_pth(tmp_path, make_tensors("6.0 tuned"), "state.pth"))
    for kind, sizes, message in (
        ("4", {}, "cannot be used with an RWKV-4 model"),
        ("6.0", {"n_layer": 2}, "is for 3 layers, the model has 2"),
        ("5.2", {"n_embd": 32}, r"blocks\.0\.att\.time_state is \(3, 8, 8\), the model needs \(4, 8, 8\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge_tuned_state(*load(save_pth(tmp_path, make_tensors(kind, **sizes))), state)
    with pytest.raises(CheckpointError, match="holds no tuned state"):
        load_tuned_state(save_pth(tmp_path, make_tensors("6.0")))
    state_file = save_pth(tmp_path, state, "alone.pth")
    with pytest.raises(CheckpointError, match="is a tuned state, not a whole model"):
        load_model(state_file)


@pytest.mark.gpu
def test_a_model_is_loaded_on_a_gpu(tmp_path: Path) -> None:
    path = save_pth(tmp_path, make_tensors("6.0", dtype=torch.float16))
    model = load_model(path, device="cuda").model
    assert {weight.device.type for weight in model.parameters()} == {"cuda"}
    assert model.head.weight.dtype == torch.float16
    with torch.no_grad():
        logits = model(IDX.cuda())[0].cpu()
    torch.testing.assert_close(logits, load_model(path).model(IDX)[0].detach(), atol=0.05, rtol=0.05)
