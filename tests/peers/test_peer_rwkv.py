"""Fledge against the PyPI package `rwkv`, the reference implementation of every version that Fledge runs.

Random checkpoints of all versions and a trained one go through both, in sequence mode and token by token. Every logit
of every position and every number of the state, after each piece, must agree to 2e-5 in float32.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoints import random_checkpoint
from torch import Tensor

from fledge.checkpoint import inspect, load_model
from fledge.models import State
from fledge.models.state import Rwkv4State

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="needs the PyPI package rwkv"),
]

RUNNER = Path(__file__).with_name("rwkv_runner.py")
TOLERANCE = 2e-5
VOCAB = 37
MODES = {"sequence": [9, 14], "token_by_token": [1] * 23}  # lengths of the pieces that are fed one after another


@dataclass(frozen=True)
class Case:
    """One checkpoint. `sorted` names the tensors in alphabetical order, as safetensors does, not in the trainer's."""

    name: str
    version: str
    sizes: dict[str, Any] = field(default_factory=dict)
    sorted: bool = False


# The package finds the version from the order of the names. With one layer it reads 4 and 6.0 only in the trainer's
# order, 5.x only in alphabetical order. It takes a tuned state only where there are two heads or more.
CASES = [
    Case("4-one-layer", "4", {"n_layer": 1, "n_embd": 48}),
    Case("4-three-layers", "4", {"n_layer": 3, "n_embd": 96}),
    Case("4-wide", "4", {"n_layer": 2, "n_embd": 320, "dim_ffn": 71}),
    Case("5.0-faaaa", "5.0", {"n_layer": 2, "n_embd": 48}),
    Case("5.0-first", "5.0", {"n_layer": 3, "n_embd": 96, "bonus": "time_first"}),
    Case("5.0-one-layer", "5.0", {"n_layer": 1, "n_embd": 48}, sorted=True),
    Case("5.0-head-64", "5.0", {"n_layer": 2, "n_embd": 320, "head_size": 64, "bonus": "time_first"}),
    Case("5.0-tuned", "5.0", {"n_layer": 2, "n_embd": 48, "tuned_state": True}),
    Case("5.1-faaaa", "5.1", {"n_layer": 2, "n_embd": 96}),
    Case("5.1-first", "5.1", {"n_layer": 3, "n_embd": 48, "bonus": "time_first"}),
    Case("5.1-one-layer", "5.1", {"n_layer": 1, "n_embd": 48}, sorted=True),
    Case("5.1-head-64", "5.1", {"n_layer": 2, "n_embd": 320, "head_size": 64}),
    Case("5.1-tuned", "5.1", {"n_layer": 2, "n_embd": 48, "tuned_state": True}),
    Case("5.2-two-layers", "5.2", {"n_layer": 2, "n_embd": 48}),
    Case("5.2-one-layer", "5.2", {"n_layer": 1, "n_embd": 96}, sorted=True),
    Case("5.2-head-64", "5.2", {"n_layer": 3, "n_embd": 320, "head_size": 64}),
    Case("5.2-one-head", "5.2", {"n_layer": 2, "n_embd": 24, "head_size": 24}),
    Case("5.2-tuned", "5.2", {"n_layer": 3, "n_embd": 48, "tuned_state": True}),
    Case("6.0-one-layer", "6.0", {"n_layer": 1, "n_embd": 48}),
    Case("6.0-odd-sizes", "6.0", {"n_layer": 3, "n_embd": 96, "mix_rank": 5, "decay_rank": 7, "dim_ffn": 71}),
    Case("6.0-sorted", "6.0", {"n_layer": 2, "n_embd": 48}, sorted=True),
    Case("6.0-head-64", "6.0", {"n_layer": 3, "n_embd": 320, "head_size": 64, "mix_rank": 32, "decay_rank": 64}),
    Case("6.0-one-head", "6.0", {"n_layer": 2, "n_embd": 24, "head_size": 24}),
    Case("6.0-tuned", "6.0", {"n_layer": 3, "n_embd": 48, "tuned_state": True}),
]


def pieces_of(mode: str, vocab_size: int = VOCAB) -> list[list[int]]:
    """The token ids of a mode, cut into its pieces. Both modes read the same tokens."""
    tokens = torch.randint(vocab_size, (sum(MODES[mode]),), generator=torch.Generator().manual_seed(5))
    return [piece.tolist() for piece in tokens.split(MODES[mode])]


def ask_rwkv(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Have the package do `jobs`, as rwkv_runner.py describes them."""
    jobs_file = folder / "jobs.json"
    jobs_file.write_text(json.dumps(jobs), encoding="utf-8")
    run = subprocess.run([sys.executable, str(RUNNER), str(jobs_file)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of every case, and what the package answered in each mode."""
    folder = tmp_path_factory.mktemp("peer")
    jobs = []
    for seed, case in enumerate(CASES):
        tensors = random_checkpoint(case.version, vocab_size=VOCAB, seed=seed, **case.sizes)
        checkpoint = folder / f"{case.name}.pth"
        torch.save({name: tensors[name] for name in sorted(tensors)} if case.sorted else tensors, checkpoint)
        runs = {mode: pieces_of(mode) for mode in MODES}
        jobs.append({"checkpoint": str(checkpoint), "runs": runs, "results": str(folder / f"{case.name}.results")})
    ask_rwkv(jobs, folder)
    return folder


def layers_of(state: State) -> list[list[Tensor]]:
    """A state of one sequence in the package's order: for each layer att shift, wkv (4: aa, bb, pp), ffn shift."""
    names = (
        ("att_shift", "aa", "bb", "pp", "ffn_shift")
        if isinstance(state, Rwkv4State)
        else ("att_shift", "wkv", "ffn_shift")
    )
    fields = state.tensors()
    assert sorted(names) == sorted(fields)
    return [[fields[name][layer, 0] for name in names] for layer in range(len(fields["att_shift"]))]


def check_agreement(checkpoint: Path, pieces: list[list[int]], theirs: dict[str, Any]) -> None:
    """Feed `pieces` to Fledge as the package was fed, and compare each state and every logit."""
    model = load_model(checkpoint).model
    state, logits = None, []
    for piece, their_state in zip(pieces, theirs["states"], strict=True):
        with torch.no_grad():
            out, state = model(torch.tensor([piece]), state)
        logits.append(out[0])
        our_state = [tensor for layer in layers_of(state) for tensor in layer]
        for ours, their_tensor in zip(our_state, their_state, strict=True):
            torch.testing.assert_close(ours, their_tensor, rtol=0, atol=TOLERANCE)
    assert theirs["logits"].std() > 0.3  # a model whose logits are all alike would agree with anything
    torch.testing.assert_close(torch.cat(logits), theirs["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_random_checkpoints_agree(folder: Path, case: Case, mode: str) -> None:
    answers = torch.load(folder / f"{case.name}.results", weights_only=True)
    assert "error" not in answers, answers["error"]
    checkpoint = folder / f"{case.name}.pth"
    assert inspect(checkpoint).config.version == case.version
    check_agreement(checkpoint, pieces_of(mode), answers[mode])


def test_trained_checkpoint_agrees(shared: Path, tmp_path: Path) -> None:
    checkpoint = shared / "models" / "tiny-eagle" / "model.pth"
    if not checkpoint.exists():
        pytest.skip("needs ../shared/models/tiny-eagle/model.pth")
    runs = {mode: pieces_of(mode, vocab_size=256) for mode in MODES}
    results = tmp_path / "results"
    ask_rwkv([{"checkpoint": str(checkpoint), "runs": runs, "results": str(results)}], tmp_path)
    answers = torch.load(results, weights_only=True)
    for mode, pieces in runs.items():
        check_agreement(checkpoint, pieces, answers[mode])
