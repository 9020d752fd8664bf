"""`fledge convert`: the result, what is said about it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fledge import checkpoint


def test_to_pth_and_back(fledge: Any, pruned_model: Path, tmp_path: Path) -> None:
    result = fledge("convert", pruned_model, tmp_path / "model.pth")
    size = (tmp_path / "model.pth").stat().st_size
    assert result.code == 0 and result.text == f"{tmp_path / 'model.pth'}: pth, {size:,} bytes\n"
    assert "a .pth cannot hold the tokenizer" in result.messages
    assert fledge("convert", tmp_path / "model.pth", tmp_path / "model.safetensors").messages == ""
    before, after = checkpoint.load(pruned_model)[1], checkpoint.load(tmp_path / "model.safetensors")[1]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_to_a_folder(fledge: Any, pruned_model: Path, tmp_path: Path) -> None:
    assert fledge("convert", pruned_model, tmp_path / "folder", "--to", "fla").code == 0
    assert checkpoint.inspect(tmp_path / "folder").format == "fla"


def test_to_gguf_with_a_type(fledge: Any, pruned_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    result = fledge("convert", pruned_model, tmp_path / "m.gguf", "--type", "q8_0")
    assert result.code == 0 and result.text.startswith(f"{tmp_path / 'm.gguf'}: gguf, ")
    assert "not a multiple of 32" in result.messages and "cannot hold the extras" in result.messages
    rows = fledge("info", tmp_path / "m.gguf").text
    assert "int8" in rows and "Q8_0" in rows and "World, pruned to 357 rows" in rows
    fledge("convert", pruned_model, tmp_path / "m.pth", "--type", "q8_0").check_error(2, "'q8_0'", "gguf")


def test_existing_file_is_kept_without_force(fledge: Any, byte_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    target.write_bytes(b"precious")
    fledge("convert", byte_model, target).check_error(1, "exists", "force")
    assert target.read_bytes() == b"precious"
    assert fledge("convert", byte_model, target, "--force").code == 0
    assert checkpoint.inspect(target).config.vocab_size == 256


def test_an_unknown_format(fledge: Any, byte_model: Path, tmp_path: Path) -> None:
    fledge("convert", byte_model, tmp_path / "x", "--to", "onnx").check_error(2, "format 'onnx' is unknown")
