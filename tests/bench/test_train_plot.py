"""The plot of a training record: what goes into it, and that a file comes out."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fledge.bench.train_plot import Line, draw, lines_of
from fledge.core.errors import UsageError


def program(rate: float) -> dict[str, Any]:
    summary = {"median": rate, "min": rate / 2, "max": 2 * rate}
    return {"tokens_per_s": summary, "peak_bytes": {name: 2**30 * value for name, value in summary.items()}}


def record() -> dict[str, Any]:
    models = {
        "finch": {"family": "RWKV-6 Finch", "parameters": 9_100_000},
        "transformer": {"family": "Transformer", "parameters": 9_200_000},
    }
    groups = [
        {"dtype": "fp32", "length": 1024, "programs": {"finch": program(5.0), "transformer": program(4.0)}},
        {"dtype": "fp32", "length": 512, "programs": {"finch": program(6.0), "loop": program(0.1)}},
        {"dtype": "bf16", "length": 512, "programs": {"finch": program(9.0), "fla": program(8.0)}},
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


def test_lines_go_through_the_lengths_in_order() -> None:
    finch, transformer, loop = lines_of(record(), "fp32", "tokens_per_s")
    assert finch == Line("finch", (512, 1024), (6.0, 5.0), (3.0, 2.5), (12.0, 10.0))
    assert (loop.program, transformer.program, transformer.lengths) == ("loop", "transformer", (1024,))
    memory = lines_of(record(), "fp32", "peak_bytes")
    assert [line.program for line in memory] == ["finch", "transformer"] and memory[0].median[0] == 6 * 2**30
    unknown = record()
    unknown["groups"][2]["programs"]["fla"]["peak_bytes"] = None
    assert [line.program for line in lines_of(unknown, "bf16", "peak_bytes")] == ["finch"]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize("name", ["p.png", "p.svg"])
def test_a_file_is_drawn(tmp_path: Path, name: str) -> None:
    draw(record(), tmp_path / name)
    begin = (tmp_path / name).read_bytes()[:200]
    assert begin.startswith(b"\x89PNG") if name.endswith("png") else b"<?xml" in begin


def test_other_records_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    for other in ({"benchmark": "cpu"}, {"benchmark": "train", "groups": []}, {}):
        with pytest.raises(UsageError, match="only records of `fledge bench train`"):
            draw(other, tmp_path / "p.png")
