"""Runs checkpoints through the PyPI package `rwkv` and writes what it answers. Started as a program of its own.

The package reads environment variables and sets global torch options when it is imported, and prints as it loads;
in a process of its own none of that reaches the tests. It takes one argument, a JSON file:

    [{"checkpoint": "a.pth", "runs": {"sequence": [[1, 2], [3]]}, "results": "a.results", "state": "s.pth"}, ...]

"state" may be absent: a tuned state's file, with which every run then begins, as the package's chat demo does it.
The pieces of a run are fed one after another with the state carried on. A results file holds for each run
{"logits": (T, vocab), "states": [[tensor, ...] after each piece]}, or {"error": text} where the package failed.
This file imports nothing of fledge.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

# No compiled functions (minutes of start-up for tiny models), no CUDA extension, versions 4 to 6.
SETTINGS = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0"}
FOREIGN_SETTINGS = ("RWKV_RESCALE_LAYER", "RWKV_DML_ON", "RWKV_DE_VERSION")


def tuned_state(file: str, model: Any) -> list[Any]:
    """The package's state before the first token: the file holds value channels first, the state key channels first."""
    import torch

    raw, width = torch.load(file, weights_only=True), model.args.n_embd
    layers = [raw[f"blocks.{layer}.att.time_state"].transpose(1, 2).float() for layer in range(model.args.n_layer)]
    return [part for wkv in layers for part in (torch.zeros(width), wkv.contiguous(), torch.zeros(width))]


def answers(checkpoint: str, runs: dict[str, list[list[int]]], state_file: str | None = None) -> dict[str, Any]:
    """For each run the logits of every position and the state after each piece.

    A piece of one token takes the package's decode path, a longer one its prefill path.
    """
    import torch
    from rwkv.model import RWKV

    model = RWKV(model=checkpoint, strategy="cpu fp32", verbose=False)
    results = {}
    for name, pieces in runs.items():
        logits, states, state = [], [], tuned_state(state_file, model) if state_file else None
        for piece in pieces:
            out, state = model.forward(list(piece), state, full_output=True)
            logits.append(out.reshape(len(piece), -1))
            states.append([tensor.clone() for tensor in state])  # the package overwrites the tensors of its list
        results[name] = {"logits": torch.cat(logits), "states": states}
    return results


def main(jobs_file: str) -> None:
    os.environ.update(SETTINGS)
    for name in FOREIGN_SETTINGS:
        os.environ.pop(name, None)
    import rwkv.model  # noqa: F401 - imported now, so that the garbage collections of each load need not walk it
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    for job in json.loads(Path(jobs_file).read_text(encoding="utf-8")):
        try:
            results = answers(job["checkpoint"], job["runs"], job.get("state"))
        except Exception:
            results = {"error": traceback.format_exc()}
        torch.save(results, job["results"])


if __name__ == "__main__":
    main(sys.argv[1])
