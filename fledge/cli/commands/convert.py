"""`fledge convert`: a checkpoint in another format, with no value changed but where a type is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fledge.cli.terminal import SlowBar, note, visible

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
            help="Of the matrices: f32, f16 or bf16; in a gguf also q8_0, q4_0, q4_1, q5_0, q5_1. (default: as is)",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Write a checkpoint in another format.

    The values and their dtypes stay as they are, unless --type asks for another.
    """
    with SlowBar(f"converting {source}"):
        from fledge import checkpoint

        done = checkpoint.convert(source, target, to=to, matrix_type=matrix_type, force=force)
    print(visible(f"{done.target}: {done.format}, {done.nbytes:,} bytes"))
    for sentence in done.notes:
        note(f"note: {sentence}")
