"""The plot of `fledge bench train`: tokens per second and peak memory by context length.

There is one column per dtype and one line per program. Lines are medians, error bars are the extremes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fledge.bench.plot_renderer import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    YELLOW,
    Panel,
    Plot,
    Series,
    describe_machine,
)

COLORS = {
    "finch": ORANGE,
    "eagle": ORANGE,
    "transformer": BLUE,
    "chunked": YELLOW,
    "loop": GREEN,
    "fla": PURPLE,
}
LABELS = {
    "chunked": "{family}, chunks in torch",
    "loop": "{family}, token by token in torch",
    "fla": "flash-linear-attention's {family}",
}
METRICS = {"tokens_per_s": ("tokens/s", 1.0), "peak_bytes": ("peak memory, GiB", 2.0**30)}


def plot_train(record: Mapping[str, Any]) -> Plot:
    """Return the plot of a record."""
    rows = list[list[Panel]]()
    for key, (name, unit) in METRICS.items():
        panels = list[Panel]()
        for dtype in dict.fromkeys(group["dtype"] for group in record["groups"]):
            title, x_label = ("", "tokens of context") if rows else (f"matrix products in {dtype}", "")
            panels.append(Panel(collect_series(record, dtype, key), title, x_label, "" if panels else name, unit))
        rows.append(panels)
    settings, on_cpu = record["settings"], record["device"] == "cpu"
    device = (
        describe_machine(record, record["threads"]) if on_cpu else f"{record['device']}, {describe_machine(record)}"
    )
    caption = (
        f"{settings['shape']}, vocabulary of {settings['vocab']}, {settings['tokens']} tokens per step. {device}. "
        f"Median and extremes of {settings['repeats']}."
    )
    return Plot(rows, caption, (5.2, 2.85))


def collect_series(record: Mapping[str, Any], dtype: str, key: str) -> list[Series]:
    """Return the lines of one panel, in the order of COLORS."""
    models = record["models"]
    labels = {name: f"{model['family']} ({model['parameters'] / 1e6:.1f}M)" for name, model in models.items()}
    family = next(iter(models.values()))["family"]
    groups = sorted((group for group in record["groups"] if group["dtype"] == dtype), key=lambda group: group["length"])
    series = []
    for program, color in COLORS.items():
        # The loop's step has fewer tokens, so its memory cannot be compared.
        if program == "loop" and key == "peak_bytes":
            continue
        points = {group["length"]: group["programs"].get(program, {}).get(key) for group in groups}
        points = {length: summary for length, summary in points.items() if summary}
        if points:
            label = labels.get(program) or LABELS[program].format(family=family)
            series.append(Series(label, color, points))
    return series
