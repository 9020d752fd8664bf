"""`fledge data`: a store from a config, what it holds, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fledge.data.binidx import open_binidx_writer

CONFIG = """
[[sources]]
path = "corpus/*.jsonl"

[languages]
identify = false

[dedup]
near = false

[validation]
share = 0.2
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config and its corpus, in the working directory."""
    (tmp_path / "corpus").mkdir()
    rows = [{"text": f"This is text number {number} of a few.", "lang": "en", "src": "s"} for number in range(40)]
    (tmp_path / "corpus" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_build_and_info(fledge: Any, corpus: Path) -> None:
    result = fledge("data", "build", "small.toml", "--to", "store", "--workers", "1", "--record", "record.json")
    assert result.code == 0, result.messages
    assert "store" in result.text and "2.8 kB of input files in " in result.messages and "report" in result.text
    assert (corpus / "store" / "manifest.json").is_file()
    record = json.loads((corpus / "record.json").read_text())
    assert record["seconds"]["reading and cleaning"] > 0 and record["input_bytes"] > 2000 and record["machine"]["cpu"]
    again = fledge("data", "build", "small.toml", "--to", "store", "--workers", "1")
    assert again.text == result.text and "already finished" in again.messages and "/s" not in again.messages
    again = fledge("data", "info", "store")
    assert again.code == 0 and again.text == result.text
    assert "by language" in again.text and "en " in again.text and "65,536" in again.text
    pair = fledge("data", "info", "store/train")
    assert pair.code == 0 and "by language" not in pair.text
    part = fledge("data", "info", "store/validation")
    assert "contents" in part.text and "train" not in part.text


def test_check(fledge: Any, corpus: Path) -> None:
    fledge("data", "build", "small.toml", "--to", "store", "--workers", "1")
    whole = fledge("data", "check", "store")
    assert whole.code == 0 and "train.bin" in whole.text and "ok" in whole.text
    for suffix in (".bin", ".idx"):
        (corpus / f"mine{suffix}").write_bytes((corpus / "store" / f"train{suffix}").read_bytes())
    assert "largest id" in fledge("data", "check", "mine").text
    assert "no vocabulary recorded" in fledge("data", "info", "mine").text
    data = bytearray((corpus / "store" / "train.bin").read_bytes())
    data[20] ^= 1
    (corpus / "store" / "train.bin").write_bytes(data)
    fledge("data", "check", "store").check_error(1, "store: train.bin changed since the build")


def test_a_model_of_a_bare_pair_with_few_ids(fledge: Any, tmp_path: Path) -> None:
    """What the pair does not say, the recipe can; the model has no vocabulary then."""
    with open_binidx_writer(tmp_path / "mine", "<u2") as writer:
        writer.add([number % 31 for number in range(400)])
    sizes = {
        "n_layer": 1,
        "n_embd": 64,
        "length": 8,
        "batch": 2,
        "micro_batch_size": 2,
        "steps": 1,
        "warmup_steps": 0,
        "log_every": 1,
    }
    words = [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
    command = ["train", "tiny", "--data", tmp_path / "mine", *words, "--to", tmp_path / "run", "--set"]
    fledge(*command, "vocab_size=30").check_error(1, "vocab_size is 30, but the data has ids up to 30; set it to 31")
    result = fledge(*command, "vocab_size=32")
    assert result.code == 0, result.messages
    facts = json.loads(fledge("info", tmp_path / "run" / "model.safetensors", "--json").text)
    assert facts["config"]["vocab_size"] == 32 and facts["tokenizer"].startswith("unknown")


def test_steps_and_recipe(fledge: Any) -> None:
    assert "nfc" in fledge("data", "steps").text and "{min_letters = ...}" in fledge("data", "steps").text
    assert "[[mixture.groups]]" in fledge("data", "recipe", "world-v2").text


def test_mistakes(fledge: Any, corpus: Path) -> None:
    fledge("data", "build", "none.toml", "--to", "x").check_error(2, "there is no config none.toml", "world-v2")
    fledge("data", "build", "corpus", "--to", "x").check_error(2, "corpus is a folder; name the TOML file")
    fledge("data", "info", "none").check_error(2, "there is no token store none")
    fledge("data", "build", "small.toml", "--to", "x", "--workers", 0).check_error(2, "workers is 0")
    (corpus / "small.toml").write_text(CONFIG.replace("share", "shares"))
    fledge("data", "build", "small.toml", "--to", "x").check_error(1, "small.toml", "'shares'", "'share'")
    (corpus / "small.toml").write_text(CONFIG)
    with open(corpus / "corpus" / "a.jsonl", "a") as file:
        file.write("{\n")
    result = fledge("data", "build", "small.toml", "--to", "x", "--workers", 1)
    result.check_error(2, "a.jsonl, line 41", "on_error")
