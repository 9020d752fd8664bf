"""`fledge convert`: the result, what is said about it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def test_what_is_there_is_kept_unless_forced(fledge: Any, byte_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    target.write_bytes(b"precious")
    fledge("convert", byte_model, target).check_error(1, "exists", "force")
    assert target.read_bytes() == b"precious"
    assert fledge("convert", byte_model, target, "--force").code == 0
    assert checkpoint.inspect(target).config.vocab_size == 256


def test_an_unknown_format(fledge: Any, byte_model: Path, tmp_path: Path) -> None:
    fledge("convert", byte_model, tmp_path / "x", "--to", "onnx").check_error(2, "format 'onnx' is unknown")
