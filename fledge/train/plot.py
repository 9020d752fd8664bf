"""A plot of the losses of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fledge.core.files import atomic_path
from fledge.train.metrics import Line, read_lines

PREFIX = "bpb_"


def plot_losses(metrics: Path, target: Path) -> None:
    """Write a PNG file: the training loss on the left, bits per byte by language on the right, over the steps."""
    lines = read_lines(metrics)
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _plot_curve(left, lines, "loss", linewidth=1.0)
    left.set(xlabel="step", ylabel="nats per token", title="Training loss")
    names = sorted({name for line in lines for name in line if name.startswith(PREFIX)})
    for name in names:
        style = {"color": "black", "linewidth": 2.0} if name == f"{PREFIX}mean" else {"linewidth": 1.0}
        _plot_curve(right, lines, name, label=name.removeprefix(PREFIX), **style)
    right.set(xlabel="step", ylabel="bits per byte", title="Validation")
    if names:
        right.legend(fontsize="small", ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _plot_curve(axes: Any, lines: Sequence[Line], name: str, **style: Any) -> None:
    points = [(line["step"], line[name]) for line in lines if name in line]
    if points:
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None, **style)
