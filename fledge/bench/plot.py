"""Draw a record as a plot, without measuring again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.bench.cpu.plot import plot_cpu
from fledge.bench.plot_renderer import render
from fledge.bench.serve.plot import plot_serve
from fledge.bench.train.plot import plot_train
from fledge.core.errors import UsageError
from fledge.core.files import atomic_path

PLOTS = {"cpu": ("models", plot_cpu), "train": ("groups", plot_train), "serve": ("loads", plot_serve)}
"""Benchmark -> the key of its results in a record, and the function that makes a plot of the record."""


def check_plottable(path: Path) -> None:
    """Raise UsageError if a plot could not be written to `path` later."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path}: a plot is a .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('a plot needs matplotlib; install it with `pip install "fledge[bench]"`')


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a benchmark. Raises UsageError for a file that cannot be read as JSON."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a record: {error}") from None
    return record if isinstance(record, dict) else {}


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record into a file. Raises UsageError for an unknown suffix or record, or without matplotlib."""
    check_plottable(path)
    key, plot = PLOTS.get(str(record.get("benchmark")), ("", None))
    if plot is None or not record.get(key):
        raise UsageError("only records of `fledge bench cpu`, `train` and `serve` can be drawn")
    figure = render(plot(record))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())
