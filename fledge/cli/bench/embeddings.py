"""`fledge bench embeddings`: how well embeddings agree with human similarity scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.bench.runner import OutputOptions, RecordOption, run_suite
from fledge.cli.terminal import escape_controls, print_heading, print_rows

if TYPE_CHECKING:
    from fledge.bench.embeddings import EmbeddingsBenchmark


def embeddings(
    pairs: Annotated[Path, typer.Argument(help="JSON lines with a, b, score (similarity, any scale) and lang.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="A checkpoint. (default: the bundled one)")] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs of each language, at most. (default: all)")] = None,
    record: RecordOption = None,
) -> None:
    """Measure embeddings: rank correlation of their cosines with human similarity scores, by language.

    The last line on standard output is one JSON object.
    """

    def load() -> EmbeddingsBenchmark:
        from fledge.bench.embeddings import EmbeddingsBenchmark

        return EmbeddingsBenchmark(pairs, model, limit)

    result = run_suite(load, OutputOptions(record), "pairs")
    print_heading(escape_controls(result["model"]))
    languages = result["languages"]
    columns = ("model", "words_in_common")
    rows = [
        (escape_controls(language), f"{values['pairs']}", *(f"{values[column]:.3f}" for column in columns))
        for language, values in languages.items()
    ]
    print_rows(rows, ("language", "pairs", "model", "words in common"))
    print(json.dumps({key: {name: values[key] for name, values in languages.items()} for key in columns}))
