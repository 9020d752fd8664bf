"""`fledge convert`: write a checkpoint in another format. Values change only if `--type` asks for another type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fledge.cli.terminal import SlowBar, escape_controls, print_note

app = typer.Typer(name="convert", add_completion=False)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint (file or folder) or a hub name.")],
    target: Annotated[Path, typer.Argument(help="The file or folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(help="pth, safetensors, gguf, hf or fla. (default: by the target's suffix; a folder is hf)"),
    ] = None,
    matrix_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Matrix type: f32, f16, bf16; gguf also q8_0, q4_0, q4_1, q5_0, q5_1. (default: unchanged)",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Write a checkpoint in another format.

    Values and dtypes do not change, unless --type asks for another type.
    """
    with SlowBar(f"converting {source}"):
        from fledge import checkpoint

        report = checkpoint.convert(source, target, to=to, matrix_type=matrix_type, force=force)
    print(escape_controls(f"{report.target}: {report.format}, {report.nbytes:,} bytes"))
    for note in report.notes:
        print_note(f"note: {note}")
