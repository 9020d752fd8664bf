"""The plot of a training record: its lines."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fledge.bench.plot import draw
from fledge.bench.train.plot import collect_series


def program(rate: float) -> dict[str, Any]:
    summary = {"median": rate, "min": rate / 2, "max": 2 * rate}
    return {"tokens_per_s": summary, "peak_bytes": {name: 2**30 * value for name, value in summary.items()}}


def train_record() -> dict[str, Any]:
    models = {
        "finch": {"family": "RWKV-6 Finch", "parameters": 9_100_000},
        "transformer": {"family": "Transformer", "parameters": 9_200_000},
    }
    groups = [
        {"dtype": "fp32", "length": 1024, "programs": {"finch": program(5.0), "transformer": program(4.0)}},
        {"dtype": "fp32", "length": 512, "programs": {"finch": program(6.0), "loop": program(0.1)}},
        {"dtype": "bf16", "length": 512, "programs": {"finch": program(9.0), "fla": program(8.0)}},
        {"dtype": "bf16", "length": 1024, "programs": {"finch": program(9.0), "fla": {"rows": 1, "error": "crash"}}},
    ]
    return {
        "benchmark": "train",
        "machine": {"cpu": "some processor", "commit": None, "fledge": "0.1"},
        "device": "cpu",
        "threads": 2,
        "settings": {"shape": "L6-D256", "vocab": 8192, "tokens": 16384, "repeats": 3},
        "models": models,
        "groups": groups,
    }


def test_lines_are_ordered_by_length() -> None:
    finch, transformer, loop = collect_series(train_record(), "fp32", "tokens_per_s")
    assert finch.label == "RWKV-6 Finch (9.1M)" and list(finch.points) == [512, 1024]
    assert finch.points[1024] == {"median": 5.0, "min": 2.5, "max": 10.0}
    assert (loop.label, list(transformer.points)) == ("RWKV-6 Finch, token by token in torch", [1024])
    memory = collect_series(train_record(), "fp32", "peak_bytes")
    assert len(memory) == 2 and memory[0].points[512]["median"] == 6 * 2**30
    _, fla = collect_series(train_record(), "bf16", "tokens_per_s")
    assert list(fla.points) == [512]  # it crashed at 1024
    unknown = train_record()
    unknown["groups"][2]["programs"]["fla"]["peak_bytes"] = None
    assert len(collect_series(unknown, "bf16", "peak_bytes")) == 1


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize("name", ["p.png", "p.svg"])
def test_a_file_is_drawn(tmp_path: Path, name: str) -> None:
    draw(train_record(), tmp_path / name)
    start = (tmp_path / name).read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if name.endswith("png") else b"<?xml" in start
