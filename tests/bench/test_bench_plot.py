"""Plots: the records in benchmarks/ can be drawn again, and what cannot be drawn is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from fledge.bench.plot import PLOTS, check_plottable, draw, read_record
from fledge.bench.plot_renderer import short_number
from fledge.core.errors import UsageError

RECORDS = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("*.json"))
PLOTTABLE = [path for path in RECORDS if read_record(path).get("benchmark") in PLOTS]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize("path", PLOTTABLE, ids=lambda path: path.stem)
def test_recorded_results_are_drawn(path: Path, tmp_path: Path) -> None:
    draw(read_record(path), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_there_are_records_of_every_kind() -> None:
    assert {read_record(path)["benchmark"] for path in PLOTTABLE} == set(PLOTS)


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"a plot is a \.png"):
        check_plottable(Path("plot.jpeg"))
    with pytest.raises(UsageError, match="cannot be read as a record"):
        read_record(tmp_path / "none.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    for other in ({"benchmark": "generate"}, {"benchmark": "cpu", "models": []}, {"benchmark": "train"}, {}):
        with pytest.raises(UsageError, match="only records"):
            draw(other, tmp_path / "p.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r'pip install "fledge\[bench\]"'):
        draw({"benchmark": "cpu"}, tmp_path / "p.png")


def test_numbers_are_short() -> None:
    assert [short_number(value) for value in (1234.6, 100.4, 12.345, 0.5)] == ["1,235", "100", "12.3", "0.5"]
