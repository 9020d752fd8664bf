"""What the pictures of all benchmarks share: the file, its formats, colours and short numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from fledge.core.errors import UsageError
from fledge.core.files import atomic_path

INK, FAINT = "#222222", "#dddddd"
DASHES = (0, (4, 2))


def check_drawable(path: Path) -> None:
    """Raise UsageError where nothing could be drawn later."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path}: a plot is a .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('a plot needs matplotlib; install it with `pip install "fledge[bench]"`')


def read_record(path: Path) -> dict[str, Any]:
    """What a benchmark recorded. Raises UsageError for a file that is no record."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a record: {error}") from None
    return found if isinstance(found, dict) else {}


def write_figure(figure: Any, path: Path) -> None:
    """Whole or not at all, in the format of the suffix."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())


def bare(axes: Any) -> None:
    """Nothing but the data, an axis below and faint lines behind."""
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def short(value: float) -> str:
    """Three digits, or whole numbers above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
