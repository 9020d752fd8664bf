"""`fledge bench plot`: a record drawn again, without measuring again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fledge.cli.terminal import visible


def plot(
    record: Annotated[Path, typer.Argument(help="A record of `fledge bench cpu`, `train` or `serve`.")],
    target: Annotated[Path, typer.Argument(help="The .png, .svg or .pdf to write.")],
) -> None:
    """Draw a record again, without measuring again."""
    from fledge.bench import cpu_plot, serve_plot, train_plot
    from fledge.bench.plots import read_record

    found = read_record(record)
    drawn = {"train": train_plot.draw, "serve": serve_plot.draw}
    draw = drawn.get(str(found.get("benchmark")), cpu_plot.draw)
    draw(found, target)
    print(visible(str(target)))
