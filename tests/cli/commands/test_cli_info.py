"""`fledge info`: the facts, as rows and as JSON, from the header alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from fledge.checkpoint import get_expected_shapes
from fledge.models import ModelConfig


def test_rows(fledge: Any, pruned_model: Path) -> None:
    result = fledge("info", pruned_model)
    assert result.code == 0 and result.messages == ""
    rows = dict(line.split(maxsplit=1) for line in result.text.splitlines())
    assert rows["format"] == "safetensors" and rows["model"] == "RWKV-6 Finch, version 6.0"
    assert rows["tokenizer"].startswith("World, pruned to 357 rows")
    assert rows["steps"] == "7" and rows["corpus"] == "[bold]none[/bold]"


def test_json(fledge: Any, pruned_model: Path, byte_model: Path) -> None:
    record = json.loads(fledge("info", pruned_model, "--json").text)
    assert record["config"]["n_embd"] == 16 and record["config"]["head_size"] == 8
    assert record["tokenizer_spec"]["kind"] == "pruned" and record["extra"]["steps"] == 7
    assert record["bytes"] == pruned_model.stat().st_size and record["dtypes"] == ["float32"]
    assert json.loads(fledge("info", byte_model, "--json").text)["format"] == "pth"


def test_a_header_of_7b_parameters(fledge: Any, tmp_path: Path) -> None:
    header, end = {}, 0
    for name, shape in get_expected_shapes(ModelConfig.finch(32, 4096)).items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path / "7b.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    try:
        with open(path, "r+b") as file:
            file.truncate(8 + len(text) + end)  # a hole: 15 GB that take no room
    except OSError:
        pytest.skip("this file system has no room for a file of 15 GB, not even an empty one")
    if path.stat().st_blocks * 512 > 1 << 30:
        path.unlink()
        pytest.skip("this file system has no sparse files")
    record = json.loads(fledge("info", path, "--json").text)
    assert record["parameters"] == end // 2 > 7e9 and record["state_bytes"] == 4 * 8_650_752


def test_the_bundled_model_is_meant_without_a_file(
    fledge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fledge.engine.llm.loading.get_asset_path", lambda name: tmp_path / name)
    fledge("info").check_error(1, "the bundled model", "tiny-finch.safetensors is missing")
