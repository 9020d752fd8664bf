"""Fledge against the PyPI package `rwkv`, the reference implementation of every version that Fledge runs.

Random checkpoints of all versions and a trained one run in both, in sequence mode and token by token. Fledge also
computes everything in float64. Every logit of every position and every state tensor, after each piece, must be within
TOLERANCE of the float64 result in both programs, so they agree to twice that. A failure names the program that is off.

Both sides round, and neither is wrong. The trained model (12 layers) reads the tokens of this test one by one. On Intel
processors with AVX-512, its wkv states, whose values reach 14, are off by up to 2.2e-5 in Fledge and 0.9e-5 in the
package. With MKL's AVX2 kernels, which are also those that it runs on AMD, both are off by 1.0e-5. A single product is
no less exact in Fledge than in the package, and with other tokens the package can be further off. Divided by the
largest value of its tensor, every error is below 4e-6. AMX has no part in it: torch uses it for bfloat16 products only.
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
from closeness import assert_close_relative, float64_arithmetic
from random_checkpoints import random_checkpoint
from torch import Tensor

from fledge.checkpoint import inspect, load_model
from fledge.models import BaseModel, State
from fledge.models.native_model import NativeModel
from fledge.models.state import Rwkv4State

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="needs the PyPI package rwkv"),
]

RUNNER = Path(__file__).with_name("rwkv_runner.py")
# The error of each program against float64, relative to the largest value of a tensor. The largest measured are 3.7e-6
# (trained model) and 2.6e-6 (random ones). Rounding is bounded by 2 * layers * terms * 2**-24 (see closeness.py):
# 1.9e-5 for the smallest case here (one layer, sums of 160 terms), 3.7e-4 for the trained model.
TOLERANCE = 1e-5
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


def feed(model: BaseModel | NativeModel, pieces: list[list[int]]) -> dict[str, Any]:
    """Logits and states of a model that reads `pieces`, in the form in which rwkv_runner.py returns them."""
    state, logits, states = None, [], []
    for piece in pieces:
        with torch.no_grad():
            out, state = model(torch.tensor([piece]), state)
        logits.append(out[0])
        states.append([tensor for layer in layers_of(state) for tensor in layer])
    return {"logits": torch.cat(logits), "states": states}


def check_agreement(checkpoint: Path, pieces: list[list[int]], theirs: dict[str, Any]) -> None:
    """Feed `pieces` to Fledge as the package was fed. Compare both with Fledge in float64: each state, every logit."""
    ours = feed(load_model(checkpoint).model, pieces)
    with float64_arithmetic():
        exact = feed(load_model(checkpoint).model.double(), pieces)
    assert exact["logits"].dtype == torch.float64
    assert exact["logits"].std() > 0.3  # a model whose logits are all alike would agree with anything
    for side, results in (("fledge", ours), ("rwkv", theirs)):
        assert_close_relative(results["logits"], exact["logits"], TOLERANCE, f"{side}, logits")
        for piece, (state, expected) in enumerate(zip(results["states"], exact["states"], strict=True)):
            for number, (tensor, reference) in enumerate(zip(state, expected, strict=True)):
                assert_close_relative(tensor, reference, TOLERANCE, f"{side}, tensor {number} after piece {piece}")


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
