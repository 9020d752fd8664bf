"""Fledge against llama.cpp: GGUF files of ours run there, and give the logits that Fledge gives.

llama.cpp rounds the inputs of a product to the type of its matrix: with F32 matrices the two differ by the order of
sums alone, with F16 ones by 11 bits, with quantized ones by the 8 bits that it gives to activations.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close_relative
from llama_runner import CHAT, TEXT
from random_checkpoints import random_checkpoint
from torch import Tensor

from fledge.checkpoint import assemble, convert, load, read, save
from fledge.tokenizer import prune, render, tokenizer_for, world_vocabulary

pytestmark = pytest.mark.peer
pytest.importorskip("gguf")
if find_spec("llama_cpp") is None:  # not imported here: its library stays in the process of the runner
    pytest.skip("needs llama-cpp-python", allow_module_level=True)

RUNNER = Path(__file__).with_name("llama_runner.py")
PIECES = [7, 1, 1, 1, 5, 1, 3]  # tokens at a time: prefill, decode, prefill, ...
# Type of the matrices -> largest difference relative to the largest logit, and root of the mean square relative to the
# deviation of the logits. For f32, rounding is bounded by 2 * layers * terms * 2**-24 on each side (see closeness.py),
# 2.7e-5 for the smallest case. Fledge is off from float64 by at most 1.4e-6 (8 layers).
TOLERANCES = {"f32": (5e-6, 4e-6), "f16": (0.005, 0.004), "bf16": (0.025, 0.03)}
TOLERANCES |= dict.fromkeys(("q8_0", "q4_0", "q4_1", "q5_0", "q5_1"), (0.12, 0.1))
SIZES: dict[str, dict[str, Any]] = {
    "head-64": {"n_layer": 8, "n_embd": 128, "head_size": 64},
    "head-8": {"n_layer": 2, "n_embd": 64, "head_size": 8, "mix_rank": 5, "decay_rank": 7},
    "head-24": {"n_layer": 2, "n_embd": 72, "head_size": 24, "dim_ffn": 100},
    "one-layer-one-head": {"n_layer": 1, "n_embd": 64, "head_size": 64},
    "no-vocabulary": {"n_layer": 2, "n_embd": 64, "head_size": 32, "vocab_size": 37},
    "all-bfloat16": {"n_layer": 2, "n_embd": 64, "head_size": 64, "dtype": torch.bfloat16},
}
CASES = [(name, "f32") for name in SIZES] + [("head-64", kind) for kind in TOLERANCES if kind != "f32"]


def pieces(vocab_size: int) -> list[list[int]]:
    tokens = torch.randint(vocab_size, (sum(PIECES),), generator=torch.Generator().manual_seed(5))
    return [piece.tolist() for piece in tokens.split(PIECES)]


def ask(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Have llama.cpp do `jobs`, as llama_runner.py describes them."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, str(RUNNER), str(folder / "jobs.json")]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of every case, and what llama.cpp answered."""
    folder = tmp_path_factory.mktemp("llama")
    jobs = []
    for name, kind in CASES:
        sizes = {"vocab_size": 256} | SIZES[name]
        torch.save(random_checkpoint("6.0", **sizes), folder / f"{name}.pth")
        file = folder / f"{name}-{kind}.gguf"
        convert(folder / f"{name}.pth", file, matrix_type=kind)
        jobs.append({"file": str(file), "pieces": pieces(sizes["vocab_size"]), "results": f"{file}.npz"})
    ask(jobs, folder)
    return folder


def our_logits(file: Path) -> Tensor:
    config, tensors = load(file)
    model, state, logits = assemble(config, tensors, dtype=torch.float32), None, []
    for piece in pieces(config.vocab_size):
        with torch.no_grad():
            out, state = model(torch.tensor([piece]), state)
        logits.append(out[0])
    return torch.cat(logits)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_same_file_gives_the_same_logits(folder: Path, name: str, kind: str) -> None:
    file = folder / f"{name}-{kind}.gguf"
    theirs = torch.from_numpy(np.load(f"{file}.npz")["logits"])
    ours = our_logits(file)
    assert theirs.std() > 0.3  # a model whose logits are all alike would agree with anything
    largest, usual = TOLERANCES[kind]
    assert_close_relative(ours, theirs, largest, "logits")
    assert (ours - theirs).square().mean().sqrt() < usual * theirs.std()
    same = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    assert same >= len(ours) - (len(ours) // 4 if kind.startswith("q") else 0)  # random logits lie close together


def test_official_code_gives_the_same_logits(folder: Path) -> None:
    """What is read back from a GGUF could be wrong in the same way as what was written; the .pth could not."""
    for name in SIZES:
        theirs = torch.from_numpy(np.load(folder / f"{name}-f32.gguf.npz")["logits"])
        assert_close_relative(our_logits(folder / f"{name}.pth"), theirs, TOLERANCES["f32"][0], name)


def test_files_that_llama_cpp_quantized(tmp_path: Path) -> None:
    """Its own mixtures of types, and its way to store a tensor whose slowest axis has length 1."""
    kinds = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q2_K": 10}
    tensors = random_checkpoint("6.0", n_layer=2, n_embd=256, head_size=256, dim_ffn=512, vocab_size=256)
    torch.save(tensors, tmp_path / "m.pth")
    convert(tmp_path / "m.pth", tmp_path / "m.gguf")
    jobs: list[dict[str, Any]] = [
        {"file": str(tmp_path / f"{kind}.gguf"), "quantize": number, "from": str(tmp_path / "m.gguf"),
         "pieces": pieces(256), "results": str(tmp_path / f"{kind}.npz")}
        for kind, number in kinds.items()
    ]  # fmt: skip
    ask(jobs, tmp_path)
    found = {}
    for kind in kinds:
        theirs = torch.from_numpy(np.load(tmp_path / f"{kind}.npz")["logits"])
        difference = our_logits(tmp_path / f"{kind}.gguf") - theirs
        assert difference.square().mean().sqrt() < 0.08 and difference.abs().max() < 0.5
        found[kind] = read(tmp_path / f"{kind}.gguf", weights=False)
    assert len(found["Q8_0"].quantized) == 17 and len(found["Q4_0"].quantized) == 16  # whose head is Q6_K
    assert "Q4_K" in found["Q4_K_M"].extra["gguf_types"] and not found["Q4_K_M"].quantized


@pytest.mark.parametrize("pruned", [False, True])
def test_text_and_chats_mean_the_same(pruned: bool, tmp_path: Path) -> None:
    world = world_vocabulary()
    vocabulary = prune(world, range(257, 4000), size=4096) if pruned else world
    tensors = random_checkpoint("6.0", n_layer=1, n_embd=32, head_size=32, vocab_size=vocabulary.size)
    torch.save(tensors, tmp_path / "m.pth")
    config, tensors = load(tmp_path / "m.pth")
    save(tmp_path / "m.safetensors", config, tensors, tokenizer_spec=vocabulary.to_spec())
    convert(tmp_path / "m.safetensors", tmp_path / "m.gguf")
    ask([{"file": str(tmp_path / "m.gguf"), "pieces": [[1]], "results": str(tmp_path / "m.npz")}], tmp_path)
    found = np.load(tmp_path / "m.npz")
    assert found["ids"].tolist() == tokenizer_for(vocabulary).encode(TEXT)
    assert found["prompt"].tobytes().decode() == render(list(CHAT))
    assert found["end"] == vocabulary.tokens.index(b"\n\n")
