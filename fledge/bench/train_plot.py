"""A picture of a record of `fledge bench train`: tokens a second and peak memory by length of context.

Drawn from the record alone. A column for each dtype, a line for each program: medians, with the extremes as bars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.bench.plots import INK, bare, check_drawable, short, write_figure
from fledge.core.errors import UsageError

COLOURS = {
    "finch": "#d9622b",
    "eagle": "#d9622b",
    "transformer": "#3f7cac",
    "chunked": "#c9a227",
    "loop": "#8fa39b",
    "fla": "#7a5c99",
}
LABELS = {
    "chunked": "{family}, chunks in torch",
    "loop": "{family}, token by token in torch",
    "fla": "flash-linear-attention's {family}",
}
PANELS = {"tokens_per_s": ("tokens/s", 1.0), "peak_bytes": ("peak memory, GiB", 2.0**30)}


@dataclass(frozen=True)
class Line:
    """One program: lengths, and for each the median and the extremes."""

    program: str
    lengths: tuple[int, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record into a file. Raises UsageError for another suffix or record, and without matplotlib."""
    check_drawable(path)
    if record.get("benchmark") != "train" or not record.get("groups"):
        raise UsageError("only records of `fledge bench train` can be drawn")
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(group["dtype"] for group in record["groups"]))
    figure = Figure(figsize=(5.2 * len(dtypes), 6.6), dpi=140, layout="constrained")
    grid = figure.subplots(len(PANELS), len(dtypes), squeeze=False)
    for column, dtype in enumerate(dtypes):
        grid[0][column].set_title(f"products in {dtype}", fontsize=10, color=INK)
        for row, (key, (name, unit)) in enumerate(PANELS.items()):
            _panel(grid[row][column], lines_of(record, dtype, key), unit)
            if column == 0:
                grid[row][0].set_ylabel(name, color=INK)
        grid[-1][column].set_xlabel("tokens of context", color=INK, fontsize=9)
    _legend(figure, record)
    write_figure(figure, path)


def lines_of(record: Mapping[str, Any], dtype: str, key: str) -> list[Line]:
    """The lines of one panel, in the order of the programs."""
    points: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for group in record["groups"]:
        for program, found in group["programs"].items() if group["dtype"] == dtype else ():
            # The loop's step has fewer tokens, so its memory means something else.
            if found[key] is not None and not (program == "loop" and key == "peak_bytes"):
                points.setdefault(program, []).append((group["length"], found[key]))
    lines = []
    for program in (name for name in COLOURS if name in points):
        found = points[program]
        found.sort(key=lambda point: point[0])
        values = [tuple(summary[name] for _, summary in found) for name in ("median", "min", "max")]
        lines.append(Line(program, tuple(length for length, _ in found), *values))
    return lines


def _panel(axes: Any, lines: list[Line], unit: float) -> None:
    for line in lines:
        median, low, high = ([value / unit for value in values] for values in (line.median, line.low, line.high))
        errors = [
            [middle - below for middle, below in zip(median, low, strict=True)],
            [above - middle for middle, above in zip(median, high, strict=True)],
        ]
        colour = COLOURS[line.program]
        style = {"marker": "o", "markersize": 4, "linewidth": 1.6, "capsize": 2}
        axes.errorbar(line.lengths, median, yerr=errors, color=colour, **style)
        text = short(median[-1])
        axes.annotate(
            text, (line.lengths[-1], median[-1]), xytext=(6, 0), textcoords="offset points", fontsize=8, color=colour
        )
    axes.set_xscale("log", base=2)
    lengths = sorted({length for line in lines for length in line.lengths})
    axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.6)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    bare(axes)


def _legend(figure: Any, record: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D

    models = record["models"]
    families = {name: f"{facts['family']} ({facts['parameters'] / 1e6:.1f}M)" for name, facts in models.items()}
    family = next(iter(models.values()))["family"]
    programs = dict.fromkeys(program for group in record["groups"] for program in group["programs"])
    handles = []
    for program in programs:
        label = families.get(program) or LABELS[program].format(family=family)
        handles.append(Line2D([], [], color=COLOURS[program], marker="o", markersize=4, label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    machine, settings = record["machine"], record["settings"]
    where = machine["cpu"] if record["device"] == "cpu" else record["device"]
    count = record["threads"]
    threads = f", {count} thread{'s' if count != 1 else ''}" if record["device"] == "cpu" else ""
    text = (
        f"{settings['shape']}, {settings['vocab']} vocabulary rows, {settings['tokens']} tokens a step. "
        f"{where}{threads}, {machine['commit'] or machine['fledge']}. Median and extremes of {settings['repeats']}."
    )
    figure.supxlabel(text, fontsize=8, color=INK)
