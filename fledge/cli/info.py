"""`fledge info`: what a checkpoint is. Reads names, shapes and metadata, never the weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.terminal import print_rows

if TYPE_CHECKING:
    from fledge.checkpoint import CheckpointInfo

app = typer.Typer(name="info", add_completion=False)


@app.command()
def info(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]", help="A checkpoint (file or folder) or a hub name. (default: the bundled model)"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a checkpoint is, without reading its weights."""
    from fledge.checkpoint import inspect
    from fledge.engine.loading import locate

    found = inspect(locate(file))
    if as_json:
        print(json.dumps(record(found), ensure_ascii=False))
        return
    print_rows([*found.rows(), *_extra_rows(found.extra)])


def record(found: CheckpointInfo) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "path": str(found.path),
        "format": found.format,
        "config": {**asdict(found.config), "family": found.config.family, "head_size": found.config.head_size},
        "parameters": found.parameters,
        "dtypes": list(found.dtypes),
        "quantised": {format: asdict(share) for format, share in found.quantised.items()},
        "bits_per_weight": found.bits_per_weight,
        "bytes": found.nbytes,
        "state_bytes": found.state_nbytes,
        "flops_per_token": found.flops_per_token,
        "tokenizer": found.tokenizer,
        "tokenizer_spec": found.tokenizer_spec,
        "extra": found.extra,
    }


def _extra_rows(extra: dict[str, Any]) -> list[tuple[str, str]]:
    """What the writer of the file added, one row a key."""
    return [(str(key).replace("_", " "), _extra_text(value)) for key, value in extra.items()]


def _extra_text(value: Any) -> str:
    """Short enough for a line: numbers to four digits, a table as "key number, ..."."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_extra_text(inner)}" for key, inner in value.items())
    return json.dumps(value)
