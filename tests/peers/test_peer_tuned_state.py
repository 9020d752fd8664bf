"""A tuned state of Fledge in the PyPI package `rwkv`: merged into the base's dict, and passed separately.

The file has the value channels first, and the states of both programs have the key channels first. Without the
transpose the logits differ, as the last test shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close_relative, relative_error
from random_checkpoints import random_checkpoint
from test_peer_rwkv import MODES, TOLERANCE, ask_rwkv, check_agreement, pieces_of, pytestmark  # noqa: F401 - the mark

import fledge
from fledge.checkpoint import read
from fledge.tokenizer import byte_vocabulary, tokenizer_for
from fledge.train.tuning.run import prepare
from fledge.train.tuning.settings import TuneSettings

VOCAB = 256


@pytest.fixture(scope="module", params=["5.2", "6.0"])
def tuned(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base.pth, the result of a run that tuned its state, and the package's answers."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.save(random_checkpoint(request.param, n_layer=3, n_embd=48, vocab_size=VOCAB), folder / "base.pth")
    (folder / "data.jsonl").write_text(json.dumps({"text": "tweet " * 5}) + "\n")
    settings = TuneSettings("state", steps=6, rate=0.5)
    run = prepare(
        read(folder / "base.pth"), tokenizer_for(byte_vocabulary()), folder / "data.jsonl", settings, device="cpu"
    )
    run.start(folder, lambda line: None)
    base, state = (torch.load(folder / name, weights_only=True) for name in ("base.pth", "state.pth"))
    torch.save({**base, **state}, folder / "together.pth")
    runs = {mode: pieces_of(mode, VOCAB) for mode in MODES}
    jobs = [
        {"checkpoint": str(folder / "together.pth"), "runs": runs, "results": str(folder / "together.results")},
        {
            "checkpoint": str(folder / "base.pth"),
            "state": str(folder / "state.pth"),
            "runs": runs,
            "results": str(folder / "beside.results"),
        },
    ]
    ask_rwkv(jobs, folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["together", "beside"])
def test_package_gives_the_same_logits(tuned: Path, mode: str, way: str) -> None:
    answers = torch.load(tuned / f"{way}.results", weights_only=True)
    assert "error" not in answers, answers["error"]
    llm = fledge.load(tuned / "base.pth", device="cpu", adapter=tuned / "state.pth")
    state, logits = llm.initial_state, []
    for piece in pieces_of(mode, VOCAB):
        with torch.no_grad():
            out, state = llm.model(torch.tensor([piece]), state)
        logits.append(out[0])
    # Each program is within TOLERANCE of float64, so the two are within twice that of each other.
    assert_close_relative(torch.cat(logits), answers[mode]["logits"], 2 * TOLERANCE, "logits")
    check_agreement(tuned / "together.pth", pieces_of(mode, VOCAB), answers[mode])


def test_state_without_transposition_gives_other_logits(tuned: Path) -> None:
    llm = fledge.load(tuned / "base.pth", device="cpu", adapter=tuned / "state.pth")
    assert llm.initial_state is not None
    theirs = torch.load(tuned / "beside.results", weights_only=True)["sequence"]["logits"][:9]
    wrong = {**llm.initial_state.tensors(), "wkv": llm.initial_state.tensors()["wkv"].transpose(-1, -2).contiguous()}
    with torch.no_grad():
        out, _ = llm.model(torch.tensor([pieces_of("sequence", VOCAB)[0]]), type(llm.initial_state)(**wrong))
    assert relative_error(out[0], theirs) > 1000 * TOLERANCE
