"""Fledge's safetensors files: contents, compatibility with the library, and hostile headers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import KINDS, are_equal, make_tensors

from fledge.checkpoint import detect, load, read, save
from fledge.checkpoint.formats.safetensors import read_safetensors, write_safetensors
from fledge.core.errors import CheckpointError, UnsupportedError, UsageError
from fledge.models import ModelConfig
from fledge.tokenizer import byte_vocabulary, prune, world_vocabulary


def detect_config(tensors: dict[str, torch.Tensor]) -> ModelConfig:
    return detect({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def write_with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Read the Fledge record in the header of a file."""
    return json.loads(read_safetensors(path, weights=False)[1]["fledge"])


def write_with_record(path: Path, tensors: dict[str, torch.Tensor], record: object) -> Path:
    write_safetensors(path, tensors, {"fledge": record if isinstance(record, str) else json.dumps(record)})
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_is_loaded_exactly(kind: str, tmp_path: Path) -> None:
    tensors = make_tensors(kind)
    config = detect_config(tensors)
    save(tmp_path / "m.safetensors", config, tensors)
    loaded, loaded_tensors = load(tmp_path / "m.safetensors")
    assert loaded == config and are_equal(tensors, loaded_tensors) and list(tensors) == list(loaded_tensors)


def test_config_tokenizer_and_extras_are_read_back(tmp_path: Path) -> None:
    vocabulary = prune(world_vocabulary(), [300, 500, 700], size=272)
    tensors = make_tensors("6.0", vocab_size=272)
    config = replace(detect_config(tensors), group_norm_eps=1e-5, norm_eps=2e-5)
    spec, extra = vocabulary.to_spec(), {"steps": 7, "loss": 2.5}
    save(tmp_path / "m.safetensors", config, tensors, tokenizer_spec=spec, extra=extra)
    loaded = read(tmp_path / "m.safetensors")
    assert (loaded.config, loaded.tokenizer_spec, loaded.extra, loaded.format) == (config, spec, extra, "safetensors")


def test_files_are_compatible_with_the_library(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    mixed = tensors | {"emb.weight": tensors["emb.weight"].to(torch.bfloat16)}
    save(tmp_path / "ours.safetensors", detect_config(tensors), mixed)
    assert are_equal(mixed, load_file(tmp_path / "ours.safetensors"))
    # Like conversions by other people: no metadata, and keys in the order of the library.
    save_file(mixed, tmp_path / "theirs.safetensors")
    config, loaded_tensors = load(tmp_path / "theirs.safetensors")
    assert config == detect_config(tensors) and are_equal(mixed, loaded_tensors)


def test_the_same_model_gives_the_same_bytes_and_aligned_data(tmp_path: Path) -> None:
    for name in "ab":
        tensors = make_tensors("6.0")
        save(tmp_path / f"{name}.safetensors", detect_config(tensors), tensors, extra={"y": 1, "x": 2})
    data = (tmp_path / "a.safetensors").read_bytes()
    assert data == (tmp_path / "b.safetensors").read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0


@pytest.mark.parametrize(("rows", "kind", "needed"), [(37, "bytes", 256), (256, "world", 65536)])
def test_a_tokenizer_of_another_size_is_an_error(rows: int, kind: str, needed: int, tmp_path: Path) -> None:
    tensors = make_tensors("5.2", vocab_size=rows)
    config = detect_config(tensors)
    message = f"has {rows} vocabulary rows, but the {kind} tokenizer .* needs {needed}"
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "m.safetensors", config, tensors, tokenizer_spec={"kind": kind})
    assert not list(tmp_path.iterdir())
    save(tmp_path / "m.safetensors", config, tensors)
    record = read_record(tmp_path / "m.safetensors") | {"tokenizer": {"kind": kind}}
    with pytest.raises(CheckpointError, match=message):
        load(write_with_record(tmp_path / "wrong.safetensors", tensors, record))


def test_an_unusable_tokenizer_record_is_an_error(tmp_path: Path) -> None:
    tensors = make_tensors("5.2", vocab_size=256)
    with pytest.raises(CheckpointError, match=r"tokenizer stored with the model cannot be used: .*'klingon'"):
        save(tmp_path / "m.safetensors", detect_config(tensors), tensors, tokenizer_spec={"kind": "klingon"})
    spec = byte_vocabulary().to_spec()
    save(tmp_path / "m.safetensors", detect_config(tensors), tensors, tokenizer_spec=spec)
    assert read(tmp_path / "m.safetensors").tokenizer_spec == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "written by a newer Fledge"),
        ({"format": None}, "no format number"),
        ({"config": None}, "is incomplete"),
        ({"extra": 5}, "is incomplete"),
        ({"config": {"version": "5.2"}}, "config in its header is impossible: ModelConfig needs vocab_size"),
    ],
)
def test_damaged_records_are_errors(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    save(tmp_path / "m.safetensors", detect_config(tensors), tensors)
    record = read_record(tmp_path / "m.safetensors") | change
    with pytest.raises(CheckpointError, match=message):
        load(write_with_record(tmp_path / "bad.safetensors", tensors, record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 10**12}, "its header says n_layer 1000000000000, its tensors say n_layer 3"),
        ({"vocab_size": 40}, "its header says vocab_size 40, its tensors say vocab_size 37"),
        ({"norm_eps": "x"}, "config in its header .*impossible"),
        ({"norm_eps": float("inf")}, "impossible epsilons"),
        ({"group_norm_eps": 10**400}, "impossible: group_norm_eps is too large"),
        ({"n_embd": "x"}, "config in its header is impossible"),
        ({"color": 1}, "has no setting 'color'"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_an_error(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = make_tensors("5.2")
    save(tmp_path / "m.safetensors", detect_config(tensors), tensors)
    record = read_record(tmp_path / "m.safetensors")
    record["config"] |= change
    with pytest.raises(CheckpointError, match=message):
        load(write_with_record(tmp_path / "bad.safetensors", tensors, record))


def test_a_record_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000):
        with pytest.raises(CheckpointError, match="is not JSON"):
            load(write_with_record(tmp_path / "bad.safetensors", make_tensors("4"), text))


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"a"', 24, "damaged safetensors header"),
        (b"[]", 24, "not a JSON object"),
        (b'{"a":' + b"[" * 200_000, 24, "damaged safetensors header"),
        (b'{"a":1,"a":2}', 24, "a name appears twice"),
        ({"__metadata__": {"a": 5}, "a": ENTRY}, 24, "not a map of texts"),
        ({"a": 5}, 24, "lacks dtype, shape or data_offsets"),
        ({"a": ENTRY | {"shape": [2, -3]}}, 24, "impossible shape or offsets"),
        ({"a": ENTRY | {"shape": [True, 6]}}, 24, "impossible shape or offsets"),
        ({"a": ENTRY | {"shape": [1] * 9 + [6]}}, 24, "impossible shape or offsets"),
        ({"a": ENTRY | {"shape": [1 << 40, 1 << 40]}}, 24, "but 24 bytes"),
        ({"a": ENTRY | {"shape": [1 << 61, 1 << 61, 0], "data_offsets": [0, 0]}}, 0, "has the impossible shape"),
        ({"a": ENTRY | {"dtype": []}}, 24, r"has dtype \[\]"),
        ({"a": ENTRY | {"dtype": {}}}, 24, r"has dtype \{\}"),
        ({"a": ENTRY | {"data_offsets": [0, 1 << 70]}}, 24, "impossible shape or offsets"),
        ({"a": ENTRY | {"data_offsets": [8, 32]}}, 32, "overlap or leave gaps at byte 0"),
        ({"a": ENTRY, "b": ENTRY}, 24, "overlap or leave gaps at byte 24"),
        ({"a": ENTRY}, 23, "truncated or damaged: its tensors need 24 bytes, 23 are present"),
        ({"a": ENTRY}, 25, "its tensors need 24 bytes, 25 are present"),
    ],
)
def test_hostile_headers_are_rejected(header: object, data: int, message: str, tmp_path: Path) -> None:
    path = write_with_header(tmp_path / "bad.safetensors", header, bytes(data))
    for weights in (True, False):
        with pytest.raises(CheckpointError, match=message):
            read(path, weights=weights)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100])
def test_a_header_larger_than_the_file_is_rejected(length: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"header claims {length} bytes, the file has 10"):
        load(path)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with open(path, "wb") as file:
        file.write((1 << 40).to_bytes(8, "little") + b"{")
        file.truncate((1 << 40) + 100)  # sparse: takes no space on disk
    with pytest.raises(CheckpointError, match="header claims 1099511627776 bytes, more than the limit of 33554432"):
        load(path)


def test_tensors_that_are_not_floats_are_unsupported(tmp_path: Path) -> None:
    path = write_with_header(
        tmp_path / "q.safetensors", {"a": ENTRY | {"dtype": "I8", "data_offsets": [0, 6]}}, bytes(6)
    )
    with pytest.raises(UnsupportedError, match="'a' has dtype 'I8'"):
        load(path)


def test_truncated_files_are_rejected(tmp_path: Path) -> None:
    tensors = make_tensors("4", n_layer=1)
    save(tmp_path / "m.safetensors", detect_config(tensors), tensors)
    data = (tmp_path / "m.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors.*(empty|truncated)"):
            load(path)


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    tensors = make_tensors("4")
    save(tmp_path / "m.safetensors", detect_config(tensors), tensors)
    (tmp_path / "m.safetensors").rename(tmp_path / "m.pth")
    assert read(tmp_path / "m.pth").format == "safetensors"
    save(tmp_path / "n.pth", detect_config(tensors), tensors)
    (tmp_path / "n.pth").rename(tmp_path / "n.bin")
    assert read(tmp_path / "n.bin").format == "pth"
    (tmp_path / "n.bin").rename(tmp_path / "n.safetensors")
    with pytest.raises(CheckpointError, match=r"with the wrong suffix; rename it to \.pth"):
        read(tmp_path / "n.safetensors")


def test_save_rejects_models_that_could_not_be_read(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    config = detect_config(tensors)
    with pytest.raises(CheckpointError, match=r"missing: ln_out\.bias"):
        save(tmp_path / "m.pth", config, {name: t for name, t in tensors.items() if name != "ln_out.bias"})
    with pytest.raises(CheckpointError, match=r"emb\.weight has torch\.int64"):
        save(tmp_path / "m.safetensors", config, tensors | {"emb.weight": tensors["emb.weight"].long()})
    with pytest.raises(CheckpointError, match=r"emb\.weight has no values"):
        save(tmp_path / "m.pth", config, tensors | {"emb.weight": tensors["emb.weight"].to("meta")})
    with pytest.raises(UsageError, match=r"'\.onnx' is not a checkpoint format"):
        save(tmp_path / "m.onnx", config, tensors)
    with pytest.raises(UsageError, match=r"a \.pth holds dense tensors only"):
        save(tmp_path / "m.pth", config, tensors, extra={"steps": 1})
    with pytest.raises(UsageError, match="must be plain JSON"):
        save(tmp_path / "m.safetensors", config, tensors, extra={"steps": {1, 2}})
    assert not list(tmp_path.iterdir())
