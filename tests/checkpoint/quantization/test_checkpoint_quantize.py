"""Quantized checkpoints: the rounded and the unchanged weights, the written file, and damaged files."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_checkpoints import KINDS, are_equal, make_tensors, save_pth
from torch import Tensor

from fledge.checkpoint import assemble, describe_base, inspect, load, load_model, read, save
from fledge.checkpoint.quantization.quantizer import MAX_BITS, SCHEMES, is_quantizable, quantize, quantize_tensors
from fledge.checkpoint.quantization.sensitivity import (
    TYPICAL_SENSITIVITY,
    MatrixImportance,
    choose_within_budget,
    compute_cost,
    estimate_cost,
)
from fledge.core.errors import CheckpointError, FledgeError, UnsupportedError, UsageError
from fledge.kernels.rounding import quantize as round_weight

# Wide enough that the padding of blocks does not outweigh the savings of 4 bits. The vocabulary fills whole panels.
WIDE: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "vocab_size": 256}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Finch with extras."""
    folder = tmp_path_factory.mktemp("source")
    config, tensors = load(save_pth(folder, make_tensors("6.0", **WIDE)))
    path = folder / "model.safetensors"
    save(path, config, tensors, tokenizer_spec={"kind": "bytes"}, extra={"steps": 7})
    return path


@pytest.mark.parametrize("kind", list(KINDS))
def test_only_matrices_of_products_are_quantized(kind: str, tmp_path: Path) -> None:
    source = save_pth(tmp_path, make_tensors(kind))
    report = quantize(source, tmp_path / "q.safetensors", "int8")
    before, after = read(source), read(tmp_path / "q.safetensors")
    products = {name for name, tensor in before.tensors.items() if name.endswith(".weight") and tensor.dim() == 2}
    assert set(after.quantized) == products - {"emb.weight"} == set(report.formats)
    assert are_equal(after.tensors, {name: t for name, t in before.tensors.items() if name not in after.quantized})
    assert after.config == before.config and set(report.formats.values()) == {"int8"}
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        dense, _ = load_model(source).model(ids)
        rounded, _ = load_model(tmp_path / "q.safetensors").model(ids)
    assert float((dense - rounded).norm() / dense.norm()) < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_contains_the_rounded_weights(scheme: str, source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "q.safetensors", scheme)
    _, tensors = load(source)
    others, matrices = quantize_tensors(tensors, scheme)
    loaded = read(tmp_path / "q.safetensors")
    assert are_equal(loaded.tensors, others) and loaded.quantized.keys() == matrices.keys()
    for name, matrix in loaded.quantized.items():
        assert (matrix.format, matrix.shape) == (matrices[name].format, matrices[name].shape)
        assert torch.equal(matrix.data, matrices[name].data)
    assert loaded.tokenizer_spec == {"kind": "bytes"}
    record = {"scheme": scheme, "calibrated": False, "base": describe_base(read(source)).identity}
    assert loaded.extra == {"steps": 7, "quantised": record}
    assert report.nbytes == (tmp_path / "q.safetensors").stat().st_size < report.nbytes_before
    assert report.bits_per_weight == inspect(tmp_path / "q.safetensors").bits_per_weight
    assert all(
        0 < error < (0.006 if loaded.quantized[name].format == "int8" else 0.1) for name, error in report.errors.items()
    )
    dense = loaded.dequantize()
    assert torch.equal(dense["head.weight"], matrices["head.weight"].dequantize())


def test_the_same_checkpoint_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(source, tmp_path / f"{name}.safetensors", "mixed")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_matrices_are_mapped_not_read(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    quantize(source, path, "int4")
    matrices = read(path).quantized
    assert all(matrix.data.data_ptr() % 64 == 0 for matrix in matrices.values())
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux reports mapped memory")
    limits = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    ranges = [range(int(start, 16), int(end, 16)) for start, end in limits]
    assert all(any(matrix.data.data_ptr() in addresses for addresses in ranges) for matrix in matrices.values())


def test_a_model_can_be_quantized_in_memory(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "q.safetensors", "int4")
    config, tensors = load(source)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    for pack in (False, True):
        from_file, _ = load_model(tmp_path / "q.safetensors", dtype=torch.float32, pack=pack).model(ids)
        in_memory, _ = assemble(config, tensors, dtype=torch.float32, pack=pack, quant="int4")(ids)
        assert torch.equal(from_file, in_memory)


# The policy of "mixed".


def test_mixed_uses_typical_sensitivities(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "q.safetensors", "mixed")
    in_int8 = {name for name, format in report.formats.items() if format == "int8"}
    assert 5.0 < report.bits_per_weight <= MAX_BITS and in_int8
    assert not any(".ffn.receptance." in name for name in in_int8)


def test_mixed_uses_calibration(source: Path, tmp_path: Path) -> None:
    _, tensors = load(source)
    sensitive = "blocks.1.ffn.receptance.weight"
    importance = {
        name: MatrixImportance(
            torch.ones(tensor.shape[1]), torch.full((tensor.shape[0],), 1e4 if name == sensitive else 1.0)
        )
        for name, tensor in tensors.items()
        if is_quantizable(name)
    }
    report = quantize(source, tmp_path / "q.safetensors", "mixed", importance=importance)
    assert report.formats[sensitive] == "int8" and report.calibrated
    assert read(tmp_path / "q.safetensors").extra["quantised"]["calibrated"] is True


def test_an_importance_of_zero_is_valid(source: Path, tmp_path: Path) -> None:
    _, tensors = load(source)
    zero = {
        name: MatrixImportance(torch.zeros(tensor.shape[1]), torch.zeros(tensor.shape[0]))
        for name, tensor in tensors.items()
        if is_quantizable(name)
    }
    report = quantize(source, tmp_path / "q.safetensors", "mixed", importance=zero)
    assert set(report.errors.values()) == {0.0} and set(report.formats.values()) == {"int4"}


def test_the_cost_follows_the_formula() -> None:
    weight = torch.randn(70, 40)
    importance = MatrixImportance(torch.rand(40), torch.rand(70))
    matrix, _ = round_weight(weight, "int4")
    squared_error = (weight.double() - matrix.dequantize(torch.float64)).square()
    expected = 0.5 * (squared_error * importance.outputs.double()[:, None] * importance.inputs.double()).sum()
    assert compute_cost(weight, matrix, importance) == pytest.approx(float(expected), rel=1e-5)
    assert estimate_cost("blocks.3.att.output.weight", 10, 0.1) == pytest.approx(
        TYPICAL_SENSITIVITY["att.output.weight"] * 0.1
    )
    assert estimate_cost("head.weight", 10, 0.0) == 0


def test_the_choice_is_optimal() -> None:
    rng = random.Random(1)
    for _ in range(30):
        names = [str(number) for number in range(9)]
        gains = {name: rng.random() for name in names}
        prices = {name: rng.randint(1, 20) * 1000 for name in names}  # multiples of a thousandth of the budget
        budget = 40_000
        subsets = [set(subset) for count in range(10) for subset in itertools.combinations(names, count)]
        affordable = [subset for subset in subsets if sum(prices[name] for name in subset) <= budget]
        best = max(affordable, key=lambda subset: sum(gains[name] for name in subset))
        assert choose_within_budget(gains, prices, budget) == best
    assert (
        choose_within_budget({"a": 1.0}, {"a": 5}, -3)
        == choose_within_budget({"a": 1.0}, {"a": 5}, 0)
        == choose_within_budget({}, {}, 10)
        == set()
    )
    assert choose_within_budget({"a": 0.0, "b": 1.0}, {"a": 1, "b": 1}, 7) == {"b"}


# Invalid requests.


def test_invalid_requests_are_rejected(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantization 'int3' is unknown; choose one of int8, int4, mixed"):
        quantize(source, tmp_path / "q.safetensors", "int3")
    with pytest.raises(UsageError, match=r"q\.pth: quantized models are written as \.safetensors"):
        quantize(source, tmp_path / "q.pth", "int8")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        quantize(source, tmp_path / "folder.safetensors", "int8", force=True)
    quantize(source, tmp_path / "q.safetensors", "int8")
    with pytest.raises(CheckpointError, match="exists"):
        quantize(source, tmp_path / "q.safetensors", "int4")
    with pytest.raises(CheckpointError, match="is already quantized"):
        quantize(tmp_path / "q.safetensors", tmp_path / "r.safetensors", "int4")
    assert quantize(source, tmp_path / "q.safetensors", "int4", force=True).scheme == "int4"


def test_a_weight_out_of_range_is_named(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    tensors["blocks.1.ffn.key.weight"][3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.key\.weight: .*numbers that int4 cannot represent"):
        quantize(save_pth(tmp_path, tensors), tmp_path / "q.safetensors", "int4")
    assert not (tmp_path / "q.safetensors").exists()


# False and damaged files.


def rewrite_file(path: Path, target: Path, change: Any = lambda record, tensors: None) -> Path:
    """Rewrite a safetensors file after `change` has modified its record and tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    record = json.loads(metadata["fledge"])
    change(record, tensors)
    save_file(tensors, target, {**metadata, "fledge": json.dumps(record)})
    return target


NAME = "blocks.1.ffn.value.weight"


def _set_shape(rows: int, columns: int) -> Any:
    return lambda record, _tensors: record["quantised"].update({NAME: ["int4", rows, columns]})


def _set_entry(entry: object) -> Any:
    return lambda record, _tensors: record["quantised"].update({NAME: entry})


def _remove_entry(record: dict[str, Any], _tensors: dict[str, Tensor]) -> None:
    del record["quantised"][NAME]


def _remove_list(record: dict[str, Any], _tensors: dict[str, Tensor]) -> None:
    del record["quantised"]


def _replace_list(record: dict[str, Any], _tensors: dict[str, Tensor]) -> None:
    record["quantised"] = ["int4"]


def _make_float(_record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = torch.zeros(64, 224)


def _shorten_tensor(_record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = tensors[NAME][:, :-1].contiguous()


def _remove_tensor(_record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[NAME]


def _add_embedding(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    record["quantised"]["emb.weight"] = ["int4", 256, 64]


def _add_vector(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["ln_out.bias"] = torch.zeros(1, 2, 1280, dtype=torch.uint8)
    record["quantised"]["ln_out.bias"] = ["int4", 1, 64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set_shape(64, 225), f"{NAME}: an int4 matrix of 64 x 225 is uint8"),
        (_set_shape(63, 224), r"blocks\.1\.ffn\.value\.weight"),
        (_set_shape(1 << 31, 1 << 31), f"{NAME}: an int4 matrix"),
        (_set_entry(["int3", 64, 224]), "which is not a valid format"),
        (_set_entry(["int4", 64]), "which is not a valid format"),
        (_set_entry(["int4", 64, 0]), "which is not a valid format"),
        (_set_entry(["int4", 64, True]), "which is not a valid format"),
        (_set_entry([["int4"], 64, 224]), "which is not a valid format"),
        (_set_entry("int4"), "which is not a valid format"),
        (_set_entry(["int8", 64, 224]), f"{NAME}: an int8 matrix of 64 x 224 is uint8"),
        (_remove_entry, rf"wrong shape: {NAME} is \(1, 7, 1280\)"),
        (_remove_list, "256 rows but head.weight has 4"),
        (_replace_list, "list of quantized matrices in its header is damaged"),
        (_make_float, r"not float32 \(64, 224\)"),
        (_shorten_tensor, f"{NAME}: an int4 matrix"),
        (_remove_tensor, "lists .* as quantized, but there is no such tensor"),
        (_add_embedding, "lists 'emb.weight' as quantized, but this tensor is never quantized"),
        (_add_vector, r"ln_out\.bias"),
    ],
)
def test_false_records_are_rejected(change: Any, message: str, source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "q.safetensors", "int4")
    path = rewrite_file(tmp_path / "q.safetensors", tmp_path / "bad.safetensors", change)
    for weights in (True, False):
        with pytest.raises(CheckpointError, match=message):
            read(path, weights=weights)


def test_uint8_tensors_of_other_programs_are_unsupported(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "q.safetensors", "int4")
    with safe_open(tmp_path / "q.safetensors", framework="pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys()}, tmp_path / "bare.safetensors")  # noqa: SIM118
    with pytest.raises((UnsupportedError, CheckpointError)):
        read(tmp_path / "bare.safetensors")


def test_truncated_files_are_rejected(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "q.safetensors", "int4")
    complete = (tmp_path / "q.safetensors").read_bytes()
    header = 8 + int.from_bytes(complete[:8], "little")
    path = tmp_path / "cut.safetensors"
    for length in (0, 7, 8, header - 1, header, header + 1280, len(complete) // 2, len(complete) - 1):
        path.write_bytes(complete[:length])
        for weights in (True, False):
            with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
                read(path, weights=weights)


def test_flipped_bytes_in_the_header_raise_only_errors_of_fledge(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "q.safetensors", "mixed")
    complete = (tmp_path / "q.safetensors").read_bytes()
    header = 8 + int.from_bytes(complete[:8], "little")
    path, rng, errors = tmp_path / "flipped.safetensors", random.Random(20), 0
    for number in range(250):
        damaged = bytearray(complete)
        for _ in range(rng.choice((1, 1, 2, 8))):
            position = rng.randrange(8 if number % 10 == 0 else header)
            damaged[position] = rng.choice(
                (damaged[position] ^ 1 << rng.randrange(8), rng.choice(b'0123456789"[]{},:'))
            )
        path.write_bytes(damaged)
        try:
            loaded = read(path)
            inspect(path)
            assemble(loaded.config, loaded.dequantize())
        except FledgeError:
            errors += 1
    assert errors > 150


def test_a_file_with_flipped_bytes_in_the_weights_loads(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "q.safetensors", "int4")
    complete = bytearray((tmp_path / "q.safetensors").read_bytes())
    header = 8 + int.from_bytes(complete[:8], "little")
    rng = random.Random(21)
    for _ in range(500):
        complete[rng.randrange(header, len(complete))] ^= 1 << rng.randrange(8)
    (tmp_path / "q.safetensors").write_bytes(complete)
    logits, _ = load_model(tmp_path / "q.safetensors", pack=True).model(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 256)
