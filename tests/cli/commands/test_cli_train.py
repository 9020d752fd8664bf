"""`fledge train`: a recipe, changes and a store in; a model, metrics and a picture out. The loop: tests/train."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fledge.checkpoint import read, save
from fledge.cli.views.training import TrainView, draw_curve, format_line
from fledge.core.files import get_asset_path
from fledge.data.pipeline.build import build
from fledge.data.pipeline.config import read_config
from fledge.tokenizer import prune, world_vocabulary

SMALL = {
    "steps": 4,
    "warmup_steps": 1,
    "n_layer": 1,
    "n_embd": 64,
    "length": 16,
    "batch": 4,
    "micro_batch_size": 2,
    "log_every": 2,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    lines = [{"text": f"Sentence number {number} of a short text, and no more.", "lang": "en"} for number in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "c.toml").write_text('vocabulary = 300\n[[sources]]\npath = "a.jsonl"\n[dedup]\nnear = false\n')
    build(read_config(folder / "c.toml"), folder, folder / "store")
    return folder / "store"


def command(store: Path, folder: Path, *more: str) -> list[str]:
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    return ["train", "tiny", "--data", str(store), "--to", str(folder), *changes, "--set", "validate_every=2", *more]


def test_finished_run_writes_a_model_and_does_not_train_again(fledge: Any, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = fledge(*command(store, folder))
    assert result.code == 0, result.messages
    assert result.text.strip() == str(folder / "model.safetensors")
    assert "step 2  loss " in result.messages and "bpb_en" in result.messages
    metrics = (folder / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == [2, 2, 4, 4]
    assert (folder / "loss.png").is_file() == (find_spec("matplotlib") is not None)
    written = fledge("generate", "Sentence", "--model", folder / "model.safetensors", "--max-tokens", "3")
    assert written.code == 0, written.messages
    facts = json.loads(fledge("info", folder / "model.safetensors", "--json").text)
    assert facts["extra"]["train_tokens"] == 4 * 4 * 16 and facts["extra"]["bits_per_byte"]["en"] > 0
    again = fledge(*command(store, folder))
    assert again.code == 0 and again.messages == "" and (folder / "metrics.jsonl").read_text() == metrics


def test_folder_of_another_run_is_not_used(fledge: Any, store: Path, tmp_path: Path) -> None:
    assert fledge(*command(store, tmp_path / "run")).code == 0
    fledge(*command(store, tmp_path / "run", "--set", "seed=2")).check_error(1, "seed was 1 and is now 2")
    fledge(*command(store, tmp_path / "run", "--set", "n_embd=128")).check_error(1, "n_embd was 64 and is now 128")


def test_begin_with_the_weights_of_a_model(fledge: Any, store: Path, tmp_path: Path) -> None:
    assert fledge(*command(store, tmp_path / "first")).code == 0
    start = str(tmp_path / "first" / "model.safetensors")
    assert fledge(*command(store, tmp_path / "second", "--from", start)).code == 0
    found = fledge(*command(store, tmp_path / "third", "--from", start, "--set", "n_layer=2"))
    found.check_error(1, "does not match the recipe: its n_layer is 1, that of the recipe 2")


def test_model_with_another_vocabulary_of_the_same_size_is_rejected(fledge: Any, store: Path, tmp_path: Path) -> None:
    assert fledge(*command(store, tmp_path / "first")).code == 0
    found = read(tmp_path / "first" / "model.safetensors")
    other, untold = tmp_path / "other.safetensors", tmp_path / "untold.pth"
    vocabulary = prune(world_vocabulary(), range(40_000, 40_040), size=300)
    save(other, found.config, found.tensors, tokenizer_spec=vocabulary.to_spec())
    result = fledge(*command(store, tmp_path / "second", "--from", str(other)))
    result.check_error(1, f"{other} has another vocabulary (pruned, 300 rows, ", "than the data (pruned, 300 rows, ")
    assert not (tmp_path / "second").exists()
    save(untold, found.config, found.tensors)
    assert fledge(*command(store, tmp_path / "second", "--from", str(untold))).code == 0


def test_begin_with_the_bundled_model(fledge: Any, tmp_path: Path) -> None:
    bundled = read(get_asset_path("tiny-finch.safetensors"))
    width, spec = bundled.config.n_embd, bundled.tokenizer_spec
    (tmp_path / "words.json").write_text(json.dumps(spec), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "The ferry leaves at seven.", "lang": "en"}\n' * 40, encoding="utf-8")
    (tmp_path / "c.toml").write_text(
        'vocabulary = "words.json"\n[[sources]]\npath = "a.jsonl"\n[dedup]\nexact = false\nnear = false\n'
        "[validation]\nshare = 0.0\n"
    )
    build(read_config(tmp_path / "c.toml"), tmp_path, tmp_path / "store")
    start = command(tmp_path / "store", tmp_path / "run", "--from", "tiny-finch", "--set", "steps=2")
    fledge(*start).check_error(1, "its n_layer is 6, that of the recipe 1", f"add --set n_layer=6 --set n_embd={width}")
    fledge(*start, "--set", "n_layer=6", "--set", f"n_embd={width}", "--set", "family=eagle").check_error(
        1, "its family is finch, that of the recipe eagle", "add --set family=finch"
    )
    result = fledge(*start, "--set", "n_layer=6", "--set", f"n_embd={width}")
    assert result.code == 0, result.messages


def test_damaged_store_is_reported(fledge: Any, store: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(store, damaged)
    ids = np.fromfile(damaged / "train.bin", np.uint16)
    ids[:] = 5000
    ids.tofile(damaged / "train.bin")
    words = f"{damaged} is damaged: it contains the token id 5000, but its vocabulary ends at 299"
    fledge(*command(damaged, tmp_path / "run")).check_error(1, words)


def test_tensorboard_receives_every_line(fledge: Any, store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fledge(*command(store, tmp_path / "run", "--tensorboard"))
    assert result.code == 0, result.messages
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "rate", "bpb_en"):
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]
        assert [(scalar.step, scalar.value) for scalar in found.Scalars(name)] == expected


def test_without_tensorboard(fledge: Any, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = fledge(*command(store, tmp_path / "run", "--tensorboard"))
    result.check_error(2, "TensorBoard is not installed", 'pip install "fledge[train]"')


def test_show_prints_every_setting_and_trains_nothing(fledge: Any, tmp_path: Path) -> None:
    result = fledge("train", "tiny", "--data", "none", "--to", tmp_path / "x", "--set", "max_lr=3e-4", "--show")
    assert result.code == 0 and not (tmp_path / "x").exists()
    rows = dict(line.split(maxsplit=1) for line in result.text.splitlines())
    assert rows["max_lr"] == "0.0003" and rows["window"] == "None"


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--set", "step=3"], 1, ["did you mean 'steps'"]),
        (["--set", "steps"], 2, ["--set needs NAME=VALUE"]),
        (
            ["--set", "length=5000"],
            2,
            [
                "store: ",
                "are too few for batches of 2 windows of 5000 tokens; use a smaller length (now 5000) or micro",
            ],
        ),
        (["--set", "max_lr=inf"], 1, ["the learning rate would fall from inf"]),
        (["--set", "n_embd=65536"], 1, ["more memory than is available"]),
        (["--parallel", "both"], 1, ["choose from ddp, fsdp"]),
        (["--set", "vocab_size=10"], 1, ["vocab_size is 10, but the data has ids up to 299"]),
        (["--set", "vocab_size=512"], 1, ["vocab_size is 512, but the vocabulary of the data has 300 ids"]),
    ],
)
def test_mistakes(fledge: Any, store: Path, tmp_path: Path, more: list[str], code: int, words: list[str]) -> None:
    fledge(*command(store, tmp_path / "run", *more)).check_error(code, *words)


def test_missing_files_are_reported(fledge: Any, tmp_path: Path) -> None:
    fledge("train", "tiny", "--to", tmp_path).check_error(2, "Missing option '--data'")
    fledge("train", "huge", "--data", "d", "--to", tmp_path).check_error(2, "no recipe 'huge'; choose from tiny")
    fledge("train", "tiny", "--data", tmp_path / "no", "--to", tmp_path).check_error(2, "there is no token store")


def test_line_with_only_the_step_is_shown_as_a_continued_run() -> None:
    assert format_line({"step": 1200}) == "continues from step 1200"
    assert format_line({"step": 4, "loss": 2.5}) == "step 4  loss 2.5"


def test_view_shows_the_reported_values() -> None:
    assert draw_curve([], 5) == "" and draw_curve([1.0], 5) == "▁"
    assert draw_curve([4.0, 3.0, 2.0, 1.0], 4) == "█▆▃▁"
    assert len(draw_curve([float(number) for number in range(1000)], 60)) == 60
    with TrainView(10) as view:
        view({"step": 5, "loss": 3.0, "tokens_per_s": 100.0, "bpb_en": 1.5})
        view({"step": 6})
        assert view.losses == [3.0] and view.latest["bpb_en"] == 1.5
