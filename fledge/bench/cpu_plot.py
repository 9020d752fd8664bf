"""A picture of a record of `fledge bench cpu`: tokens a second of every program, and what the machine allows.

It is drawn from the record alone, so that it can be drawn again without measuring again. A row for each model, a
column each for reading a prompt, writing one text and writing several at once; groups of bars by width of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.bench.plots import DASHES, INK, bare, check_drawable, short, write_figure
from fledge.core.errors import UsageError

COLOURS = {"fledge": "#d9622b", "llama.cpp": "#3f7cac", "rwkv": "#8fa39b"}
GROUP = 0.8  # width of all bars of a group, of the distance between groups
ROOM = 1.22  # above the highest bar, for its number


@dataclass(frozen=True)
class Bar:
    """One program in one group: the median and the extremes."""

    program: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """The bars of one width, and the rate that the machine's limits allow this program."""

    width: str
    bars: tuple[Bar, ...]
    ceiling: float | None


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record into a file. Raises UsageError for another suffix or record, and without matplotlib."""
    check_drawable(path)
    if record.get("benchmark") != "cpu" or not record.get("models"):
        raise UsageError("only records of `fledge bench cpu` can be drawn")
    from matplotlib.figure import Figure

    columns = columns_of(record)
    rows = len(record["models"])
    figure = Figure(figsize=(4.6 * len(columns), 0.9 + 3.1 * rows), dpi=140, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for axes, title in zip(grid[0], columns.values(), strict=True):
        axes.set_title(title, fontsize=10, color=INK)
    for line, block in zip(grid, record["models"], strict=True):
        for axes, key in zip(line, columns, strict=True):
            _panel(axes, groups_of(block, key))
        line[0].set_ylabel(f"{_model_name(block['model'])}\ntokens/s", color=INK)
    _legend(figure, record)
    write_figure(figure, path)


def columns_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Figure -> title. The batch is missing where it was not measured."""
    settings = record["settings"]
    columns = {
        "prefill": f"reading a prompt of {settings['prompt']} tokens",
        "decode": "writing one text",
        "batch": f"writing {settings['batch']} texts at once",
    }
    return {key: title for key, title in columns.items() if key != "batch" or settings["batch"] > 1}


def groups_of(block: Mapping[str, Any], key: str) -> list[Group]:
    """By the widths of this program, in its order. Of `rwkv` with and without JIT it is the faster."""
    figures: Sequence[Mapping[str, Any]] = list(block["figures"].values())
    groups = []
    for ours in (found for found in figures if found["program"] == "fledge"):
        bars: dict[str, Bar] = {}
        for found in figures:
            summary = found[f"{key}_tokens_per_s"]
            if found["width"] != ours["width"] or summary is None:
                continue
            program = found["program"].removesuffix(" jit")
            bar = Bar(program, summary["median"], summary["min"], summary["max"])
            if program not in bars or bars[program].median < bar.median:
                bars[program] = bar
        groups.append(Group(ours["width"], tuple(bars.values()), ours["ceilings_tokens_per_s"][key]))
    return groups


def _panel(axes: Any, groups: Sequence[Group]) -> None:
    top = max([bar.high for group in groups for bar in group.bars] + [group.ceiling or 0 for group in groups])
    width = GROUP / max(len(group.bars) for group in groups)
    for place, group in enumerate(groups):
        left = place - width * (len(group.bars) - 1) / 2
        for at, bar in enumerate(group.bars):
            x = left + at * width
            errors = [[bar.median - bar.low], [bar.high - bar.median]]
            axes.bar(x, bar.median, 0.92 * width, color=COLOURS[bar.program], zorder=2)
            axes.errorbar(x, bar.median, yerr=errors, color=INK, linewidth=0.9, capsize=2, zorder=3)
            axes.annotate(
                short(bar.median),
                (x, bar.high),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
                zorder=4,
            )
        if group.ceiling:
            axes.hlines(group.ceiling, place - 0.46, place + 0.46, color=INK, linewidth=1.1, linestyle=DASHES)
    axes.set_xticks(range(len(groups)), [group.width for group in groups])
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.set_ylim(0, ROOM * top)
    bare(axes)
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}" if top >= 10 else f"{value:,.1f}")


def _legend(figure: Any, record: Mapping[str, Any]) -> None:
    """Programs with their versions above the panels, the machine below them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    machine, peers = record["machine"], record["peers"]
    versions = {"fledge": machine["commit"] or machine["fledge"]}
    versions.update({name: f"{peer['package']} {peer['version']}" for name, peer in peers.items()})
    handles: list[Any] = [
        Patch(color=COLOURS[name], label=f"{name} ({versions[name]})") for name in COLOURS if name in versions
    ]
    limit = "what this machine's limits allow fledge"
    handles.append(Line2D([], [], label=limit, color=INK, linewidth=1.1, linestyle=DASHES))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    threads, repeats = record["threads"], record["settings"]["repeats"]
    text = (
        f"{machine['cpu']}, {threads} thread{'s' if threads != 1 else ''}. Bars: median of {repeats}, lines: extremes. "
        "llama.cpp int8 is Q8_0, int4 is Q4_0; rwkv: the better of JIT on and off."
    )
    figure.supxlabel(text, fontsize=8.5, color=INK)


def _model_name(model: Mapping[str, Any]) -> str:
    size = model["parameters"]
    number = f"{size / 1e9:.1f}B" if size >= 0.95e9 else f"{size / 1e6:.0f}M"
    return f"{model['family'].split()[-1]} {number}, {model['name']}"
