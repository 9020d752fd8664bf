"""`fledge quantize` and `--quant`: the file, the summary, what `info` says of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoints import random_checkpoint

from fledge import checkpoint

TEXT = "It was a dark night, and the ship had lost its way. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Finch whose tokens are bytes, wide enough for quantization to save something."""
    path = tmp_path_factory.mktemp("models") / "bytes.pth"
    torch.save(random_checkpoint("6.0", n_layer=2, n_embd=64, vocab_size=256), path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "sea.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("scheme", ["int8", "int4", "mixed"])
def test_the_file_and_its_summary(fledge: Any, model: Path, tmp_path: Path, scheme: str) -> None:
    target = tmp_path / "small.safetensors"
    result = fledge("quantize", model, target, "--to", scheme)
    assert result.code == 0 and result.messages == ""
    size, before = target.stat().st_size, sum(4 * tensor.numel() for tensor in checkpoint.load(model)[1].values())
    assert f"{size:,} bytes, {size / before:.0%} of {before:,}" in result.text
    rows = dict(line.split(maxsplit=1) for line in result.text.splitlines()[:4])
    found = checkpoint.inspect(target)
    assert rows["bits"] == f"{found.bits_per_weight:.2f} per weight of these matrices"
    assert {part.split(" in ")[1]: int(part.split()[0]) for part in rows["matrices"].split(", ")} == {
        name: share.matrices for name, share in found.quantized.items()
    }
    worst = [line for line in result.text.splitlines() if "%" in line and "blocks." in line]
    assert worst and worst[0].startswith("error of weights")


def test_info_shows_the_content_of_the_file(fledge: Any, model: Path, tmp_path: Path) -> None:
    fledge("quantize", model, tmp_path / "small.safetensors", "--to", "int4")
    assert "17 in int4; 5.17 bits per weight of these" in fledge("info", tmp_path / "small.safetensors").text
    record = json.loads(fledge("info", tmp_path / "small.safetensors", "--json").text)
    assert record["quantized"]["int4"]["matrices"] == 17 and round(record["bits_per_weight"], 2) == 5.17
    assert record["parameters"] == json.loads(fledge("info", model, "--json").text)["parameters"]
    facts = record["extra"]["quantised"]
    assert facts == {"scheme": "int4", "calibrated": False, "base": facts["base"]} and len(facts["base"]) == 64
    plain = json.loads(fledge("info", model, "--json").text)
    assert plain["quantized"] == {} and plain["bits_per_weight"] is None
    assert "bits a weight" not in fledge("info", model).text


def test_with_a_text_to_calibrate_and_one_to_report(fledge: Any, model: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    result = fledge("quantize", model, target, "--to", "mixed", "--calibrate", text, "--report", text)
    assert result.code == 0 and "error of outputs" in result.text
    assert "bytes on sea.txt" in result.text and "small.safetensors  " in result.text.splitlines()[-1]
    facts = checkpoint.inspect(target).extra["quantised"]
    assert (facts["scheme"], facts["calibrated"]) == ("mixed", True)


def test_quantized_file_generates_the_text_of_quant(fledge: Any, model: Path, tmp_path: Path) -> None:
    fledge("quantize", model, tmp_path / "bytes.safetensors", "--to", "int4")
    rest = ("--max-tokens", "8", "--seed", "3", "--json")
    from_file = json.loads(fledge("generate", "Once", "-m", tmp_path / "bytes.safetensors", *rest).text)
    at_once = json.loads(fledge("generate", "Once", "-m", model, "--quant", "int4", *rest).text)
    assert from_file["ids"] == at_once["ids"] != []


def test_quant_reaches_chat_too(fledge: Any, model: Path) -> None:
    fledge("chat", "-m", model, "--quant", "int3").check_error(2, "quantization 'int3' is unknown")
    fledge("generate", "x", "-m", model, "--quant", "int3").check_error(2, "choose one of int8, int4, mixed")


def test_existing_file_is_kept_without_force(fledge: Any, model: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    target.write_bytes(b"precious")
    fledge("quantize", model, target, "--to", "int8", "--calibrate", text).check_error(1, "exists", "--force")
    assert target.read_bytes() == b"precious"
    assert fledge("quantize", model, target, "--to", "int8", "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "int3"], 2, ["quantization 'int3' is unknown", "int8, int4, mixed"]),
        ([], 2, ["--to", "see fledge quantize --help"]),
        (["--to", "int8", "--calibrate", "gone.txt"], 2, ["there is no text file gone.txt"]),
        (["--to", "int8", "--report", "gone.txt"], 2, ["there is no text file gone.txt"]),
    ],
)
def test_mistakes(fledge: Any, model: Path, tmp_path: Path, arguments: list[str], code: int, words: list[str]) -> None:
    fledge("quantize", model, tmp_path / "small.safetensors", *arguments).check_error(code, *words)
    assert not (tmp_path / "small.safetensors").exists()


def test_a_quantized_checkpoint_is_rejected(fledge: Any, model: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    fledge("quantize", model, small, "--to", "int8")
    for more in ([], ["--calibrate", text]):
        fledge("quantize", small, tmp_path / "again.safetensors", "--to", "int4", *more).check_error(
            1, "is already quantized", "unquantized checkpoint"
        )
    fledge("quantize", model, tmp_path / "small.pth", "--to", "int8").check_error(2, "written as .safetensors")
