"""`fledge bench plot`: draw a record again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fledge.cli.terminal import escape_controls


def plot(
    record: Annotated[Path, typer.Argument(help="A record of `fledge bench cpu`, `train` or `serve`.")],
    target: Annotated[Path, typer.Argument(help="The .png, .svg or .pdf to write.")],
) -> None:
    """Draw a record again, without measuring again."""
    from fledge.bench.plot import draw, read_record

    draw(read_record(record), target)
    print(escape_controls(str(target)))
