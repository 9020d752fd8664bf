"""`fledge bench embeddings`: how near vectors of texts are to what people think of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fledge.cli.measuring import keep
from fledge.cli.terminal import SlowBar, print_heading, print_rows, visible


def embeddings(
    pairs: Annotated[Path, typer.Argument(help="JSON lines with a, b, score (likeness, any scale) and lang.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="A checkpoint. (default: the bundled one)")] = None,
    limit: Annotated[int | None, typer.Option(help="Pairs of each language at most. (default: all)")] = None,
    record: Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")] = None,
) -> None:
    """Measure vectors of texts: rank correlation of their cosines with people's scores, by language.

    The last line on standard output is one JSON object.
    """
    with SlowBar("measuring", "pairs", per_second=1) as bar:
        from fledge.bench.embeddings import run

        outcome = run(pairs, model, limit, bar.update)
    keep(outcome, record)
    print_heading(visible(outcome.model))
    rows = [
        (visible(language), f"{count}", f"{outcome.of_model[language]:.3f}", f"{outcome.of_words[language]:.3f}")
        for language, count in outcome.pairs.items()
    ]
    print_rows(rows, ("language", "pairs", "model", "words in common"))
    print(json.dumps({"model": outcome.of_model, "words_in_common": outcome.of_words}))
