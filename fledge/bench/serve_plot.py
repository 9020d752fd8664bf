"""A picture of a record of `fledge bench serve`: tokens a second and times between events, by number of clients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.bench.plots import INK, bare, check_drawable, short, write_figure
from fledge.core.errors import UsageError

COLOURS = ("#d9622b", "#3f7cac", "#7a7a7a")


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record into a file. Raises UsageError for another suffix or record, and without matplotlib."""
    check_drawable(path)
    if record.get("benchmark") != "serve" or not record.get("loads"):
        raise UsageError("only records of `fledge bench serve` can be drawn")
    from matplotlib.figure import Figure

    loads = [load for load in record["loads"] if load["gaps_s"]]
    figure = Figure(figsize=(9, 3.8), dpi=140, layout="constrained")
    left, right = figure.subplots(1, 2)
    programs = {"server": "", "engine alone": "engine_", **dict.fromkeys(record.get("peers", {}), "peer_")}
    rates = {
        name: [load[f"{prefix}tokens_per_s"]["median"] for load in record["loads"]] for name, prefix in programs.items()
    }
    _panel(left, record["loads"], rates, "tokens/s")
    gaps = {name: [1e3 * load["gaps_s"][name] for load in loads] for name in ("median", "p95")}
    _panel(right, loads, gaps, "ms between events")
    machine = record["machine"]
    where = f"{record['model']}. {machine['cpu']}, {machine['commit'] or machine['fledge']}"
    figure.supxlabel(f"clients. {where}", fontsize=8, color=INK)
    write_figure(figure, path)


def _panel(axes: Any, loads: list[Any], lines: dict[str, list[float]], title: str) -> None:
    places = range(len(loads))
    for (label, values), colour in zip(lines.items(), COLOURS, strict=False):
        axes.plot(places, values, marker="o", markersize=4, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            text = {"xytext": (0, 5), "textcoords": "offset points", "fontsize": 7.5, "ha": "center"}
            axes.annotate(short(value), (place, value), color=colour, **text)
    axes.set_xticks(list(places), [str(load["clients"]) for load in loads])
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.12, y=0.15)
    bare(axes)
    axes.legend(frameon=False, fontsize=8)
