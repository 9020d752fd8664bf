"""`fledge bench plot`: a record drawn again, without measuring again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fledge.cli.terminal import visible


def plot(
    record: Annotated[Path, typer.Argument(help="A record of `fledge bench cpu` or `fledge bench train`.")],
    target: Annotated[Path, typer.Argument(help="The .png, .svg or .pdf to write.")],
) -> None:
    """Draw a record again, without measuring again."""
    from fledge.bench import cpu_plot, train_plot
    from fledge.bench.plots import read_record

    found = read_record(record)
    draw = train_plot.draw if found.get("benchmark") == "train" else cpu_plot.draw
    draw(found, target)
    print(visible(str(target)))
