"""Render plots with matplotlib: grids of panels with bars or lines, a shared legend and a caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

INK, FAINT = "#222222", "#dddddd"
ORANGE, BLUE, GRAY, GREEN, YELLOW, PURPLE = "#d9622b", "#3f7cac", "#7a7a7a", "#8fa39b", "#c9a227", "#7a5c99"
LIMIT_STYLE: dict[str, Any] = {"color": INK, "linewidth": 1.1, "linestyle": (0, (4, 2))}
BAR_GROUP_WIDTH = 0.8  # relative to the distance between groups
HEADROOM = 1.22  # above the highest bar, for its number
BAR_LABEL: dict[str, Any] = {
    "ha": "center",
    "va": "bottom",
    "fontsize": 7.5,
    "color": INK,
    "zorder": 4,
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
}


@dataclass(frozen=True)
class Series:
    """One program in one panel. points: x -> the summary of the metric, with "median", "min" and "max"."""

    label: str
    color: str
    points: Mapping[Any, Mapping[str, float]]


@dataclass(frozen=True)
class Panel:
    """The axes of one metric. limits: x -> a dashed line."""

    series: Sequence[Series]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    unit: float = 1.0  # by which the values are divided
    limits: Mapping[Any, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """A grid of panels."""

    rows: Sequence[Sequence[Panel]]
    caption: str
    panel_size: tuple[float, float]  # inches
    bars: bool = False  # groups of bars, else lines over a logarithmic x axis
    limit_label: str = ""
    label_all_points: bool = False  # else the last point of each line


def render(plot: Plot) -> Any:
    """Return a matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    (width, height), columns = plot.panel_size, len(plot.rows[0])
    size = (width * columns, 0.9 + height * len(plot.rows))
    figure = Figure(figsize=size, dpi=140, layout="constrained")
    panels = list(chain(*plot.rows))
    for axes, panel in zip(figure.subplots(len(plot.rows), columns, squeeze=False).flat, panels, strict=True):
        if plot.bars:
            _draw_bars(axes, panel)
        else:
            _draw_lines(axes, panel, plot.label_all_points)
        axes.set_title(panel.title, fontsize=10, color=INK)
        axes.set_xlabel(panel.x_label, fontsize=9, color=INK)
        axes.set_ylabel(panel.y_label, color=INK)
        axes.grid(axis="y", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8.5)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    colors = {series.label: series.color for panel in panels for series in panel.series}
    handles: list[Any] = [Patch(color=color, label=label) for label, color in colors.items()]
    if plot.limit_label:
        handles.append(Line2D([], [], label=plot.limit_label, **LIMIT_STYLE))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    figure.supxlabel(plot.caption, fontsize=8, color=INK)
    return figure


def short_number(value: float) -> str:
    """Return three significant digits, or a whole number from 100 up."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe_machine(record: Mapping[str, Any], threads: int | None = None) -> str:
    """Return processor, threads and commit (or version) of a record, for a caption."""
    machine = record["machine"]
    count = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
    return f"{machine['cpu']}{count}, {machine['commit'] or machine['fledge']}"


def _draw_bars(axes: Any, panel: Panel) -> None:
    """A group of bars for each x. A series without a point leaves no gap."""
    names = list(dict.fromkeys(x for series in panel.series for x in series.points))
    groups = {x: [series for series in panel.series if x in series.points] for x in names}
    width = BAR_GROUP_WIDTH / max(map(len, groups.values()))
    top = max([*panel.limits.values(), *(point["max"] for series in panel.series for point in series.points.values())])
    for index, (name, group) in enumerate(groups.items()):
        for offset, series in enumerate(group):
            x, point = index + width * (offset - (len(group) - 1) / 2), series.points[name]
            axes.bar(x, point["median"], 0.92 * width, color=series.color, zorder=2)
            axes.errorbar(x, point["median"], yerr=_errors([point]), color=INK, linewidth=0.9, capsize=2, zorder=3)
            _label_point(axes, point["median"], (x, point["max"]), (0, 3), **BAR_LABEL)
        if name in panel.limits:
            axes.hlines(panel.limits[name], index - 0.46, index + 0.46, **LIMIT_STYLE)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.55, len(names) - 0.45)
    axes.set_ylim(0, HEADROOM * top)
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}" if top >= 10 else f"{value:,.1f}")


def _draw_lines(axes: Any, panel: Panel, label_all_points: bool) -> None:
    for series in panel.series:
        points = [{key: value / panel.unit for key, value in _extremes(point)} for point in series.points.values()]
        xs, medians = list(series.points), [point["median"] for point in points]
        style = {"marker": "o", "markersize": 4, "linewidth": 1.6, "capsize": 2, "color": series.color}
        axes.errorbar(xs, medians, yerr=_errors(points), **style)
        offset = (3, 6) if label_all_points else (6, 0)
        for x, median in list(zip(xs, medians, strict=True))[0 if label_all_points else -1 :]:
            _label_point(axes, median, (x, median), offset, fontsize=8, color=series.color)
    ticks = sorted({x for series in panel.series for x in series.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks])
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.6)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)


def _extremes(point: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(key, point[key]) for key in ("median", "min", "max")]


def _errors(points: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Error bars from the median to the extremes."""
    below = [point["median"] - point["min"] for point in points]
    return [below, [point["max"] - point["median"] for point in points]]


def _label_point(axes: Any, value: float, xy: tuple[float, float], offset: tuple[int, int], **style: Any) -> None:
    axes.annotate(short_number(value), xy, xytext=offset, textcoords="offset points", **style)
