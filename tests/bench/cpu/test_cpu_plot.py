"""The plot of a CPU record: its series and its panels."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fledge.bench.cpu.plot import collect_series, plot_cpu
from fledge.bench.plot import draw


def metrics(program: str, width: str, rate: float, batch: bool = True) -> dict[str, Any]:
    summary = {"median": rate, "min": rate / 2, "max": 2 * rate}
    return {
        "program": program,
        "width": width,
        "prefill_tokens_per_s": summary,
        "decode_tokens_per_s": summary,
        "batch_tokens_per_s": summary if batch else None,
        "ceilings_tokens_per_s": {"prefill": 9.0, "decode": None, "batch": 8.0},
    }


def cpu_record(batch: int = 16) -> dict[str, Any]:
    cases = [
        *(metrics("fledge", "bf16", 4.0), metrics("llama.cpp", "bf16", 3.0), metrics("fledge", "int8", 5.0)),
        *(metrics("rwkv", "bf16", 1.0, False), metrics("rwkv jit", "bf16", 2.0, False)),
        metrics("rwkv", "fp32", 7.0, False),
        {"program": "llama.cpp", "width": "int8", "error": "it crashed"},
    ]
    model = {"family": "RWKV-6 Finch", "name": "L2-D64", "parameters": 192_000_000}
    return {
        "benchmark": "cpu",
        "machine": {"cpu": "some processor", "commit": None, "fledge": "0.1"},
        "threads": 2,
        "peers": {"rwkv": {"package": "rwkv", "version": "1"}, "llama.cpp": {"package": "l", "version": "2"}},
        "settings": {"prompt": 512, "batch": batch, "repeats": 5},
        "models": [{"model": model, "figures": {str(index): case for index, case in enumerate(cases)}}] * 2,
    }


def test_series_cover_the_widths_of_fledge() -> None:
    block = cpu_record()["models"][0]
    series, limits = collect_series(block, "prefill", {"fledge": "0.1", "llama.cpp": "l 2", "rwkv": "rwkv 1"})
    assert [one.label for one in series] == ["fledge (0.1)", "llama.cpp (l 2)", "rwkv (rwkv 1)"]
    assert [list(one.points) for one in series] == [["bf16", "int8"], ["bf16"], ["bf16"]]
    assert series[2].points["bf16"] == {"median": 2.0, "min": 1.0, "max": 4.0}  # the faster of both
    assert limits == {"bf16": 9.0, "int8": 9.0} and collect_series(block, "decode", {})[1] == {}
    assert len(collect_series(block, "batch", {})[0]) == 2
    assert [len(plot_cpu(cpu_record(batch)).rows[0]) for batch in (16, 1)] == [3, 2]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize(("batch", "name"), [(16, "p.png"), (1, "p.svg")])
def test_a_file_is_drawn(tmp_path: Path, batch: int, name: str) -> None:
    draw(cpu_record(batch), tmp_path / name)
    start = (tmp_path / name).read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if name.endswith("png") else b"<?xml" in start
