"""The plot of a record: what goes into it, and that a file comes out."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fledge.bench.cpu_plot import Bar, columns_of, draw, groups_of
from fledge.bench.plots import check_drawable, read_record, short
from fledge.core.errors import UsageError


def figures(program: str, width: str, rate: float, batch: bool = True) -> dict[str, Any]:
    summary = {"median": rate, "min": rate / 2, "max": 2 * rate}
    return {
        "program": program,
        "width": width,
        "prefill_tokens_per_s": summary,
        "decode_tokens_per_s": summary,
        "batch_tokens_per_s": summary if batch else None,
        "ceilings_tokens_per_s": {"prefill": 9.0, "decode": None, "batch": 8.0},
    }


def record(batch: int = 16) -> dict[str, Any]:
    every = [
        *(figures("fledge", "bf16", 4.0), figures("llama.cpp", "bf16", 3.0), figures("fledge", "int8", 5.0)),
        *(figures("rwkv", "bf16", 1.0, False), figures("rwkv jit", "bf16", 2.0, False)),
        figures("rwkv", "fp32", 7.0, False),
    ]
    model = {"family": "RWKV-6 Finch", "name": "L2-D64", "parameters": 192_000_000}
    return {
        "benchmark": "cpu",
        "machine": {"cpu": "some processor", "commit": None, "fledge": "0.1"},
        "threads": 2,
        "peers": {"rwkv": {"package": "rwkv", "version": "1"}, "llama.cpp": {"package": "l", "version": "2"}},
        "settings": {"prompt": 512, "batch": batch, "repeats": 5},
        "models": [{"model": model, "figures": {str(at): found for at, found in enumerate(every)}}] * 2,
    }


def test_groups_are_the_widths_of_this_program() -> None:
    block = record()["models"][0]
    bf16, int8 = groups_of(block, "prefill")
    assert [bar.program for bar in bf16.bars] == ["fledge", "llama.cpp", "rwkv"] and bf16.ceiling == 9.0
    assert bf16.bars[2] == Bar("rwkv", 2.0, 1.0, 4.0) and int8.bars == (Bar("fledge", 5.0, 2.5, 10.0),)
    assert [bar.program for bar in groups_of(block, "batch")[0].bars] == ["fledge", "llama.cpp"]
    assert list(columns_of(record())) == ["prefill", "decode", "batch"]
    assert list(columns_of(record(batch=1))) == ["prefill", "decode"]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize(("batch", "name"), [(16, "p.png"), (1, "p.svg")])
def test_a_file_is_drawn(tmp_path: Path, batch: int, name: str) -> None:
    draw(record(batch), tmp_path / name)
    begin = (tmp_path / name).read_bytes()[:200]
    assert begin.startswith(b"\x89PNG") if name.endswith("png") else b"<?xml" in begin


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"a plot is a \.png"):
        check_drawable(Path("plot.jpeg"))
    with pytest.raises(UsageError, match="cannot be read as a record"):
        read_record(tmp_path / "none.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    for other in ({"benchmark": "generate"}, {"benchmark": "cpu", "models": []}, {}):
        with pytest.raises(UsageError, match="only records"):
            draw(other, tmp_path / "p.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r'pip install "fledge\[bench\]"'):
        draw(record(), tmp_path / "p.png")


def test_numbers_are_short() -> None:
    assert [short(value) for value in (1234.6, 100.4, 12.345, 0.5)] == ["1,235", "100", "12.3", "0.5"]
