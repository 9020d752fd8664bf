"""`fledge bench tokenizer`: how fast text becomes ids, with other programs in the same run where they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.measuring import keep
from fledge.cli.terminal import SlowBar, note, print_rows, visible

if TYPE_CHECKING:
    from fledge.bench.harness import Sample
    from fledge.bench.tokenizer import Outcome

HEADS = ("program", "MB/s", "against the first")


def tokenizer(
    text: Annotated[
        Path | None,
        typer.Argument(help="A file of text or of .jsonl documents, or a folder of such. (default: a made-up text)"),
    ] = None,
    megabytes: Annotated[float, typer.Option(help="Of the text at most. (default: 16)")] = 16.0,
    repeats: Annotated[int, typer.Option(help="Measurements of each program. (default: 5)")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads for batches, at most. (default: every core)")] = None,
    record: Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")] = None,
) -> None:
    """Measure tokenizers: one call a document, and batches with several threads.

    pyrwkv-tokenizer and rwkv are measured in the same run where they are installed; all must give the same ids.
    The last line on standard output is one JSON object.
    """
    with SlowBar("preparing", per_second=1) as bar:
        from fledge.bench.tokenizer import Spec, run

        outcome = run(Spec(text, megabytes, repeats, threads), bar.step)
    keep(outcome, record)
    _show(outcome)
    if repeats < 3:
        note("note: fewer than 3 repeats tell nothing about the spread")
    rates = {name: round(sample.median / 1e6, 2) for name, sample in outcome.figures.items()}
    ratio = outcome.ratio()
    print(json.dumps({"megabytes_per_s": rates, "ratio_to_the_fastest_peer": ratio and round(ratio, 2)}))


def _show(outcome: Outcome) -> None:
    text, machine = outcome.text, outcome.machine
    print(f"{visible(text['source'])}: {text['documents']:,} documents, {text['bytes']:,} bytes")
    print(f"{text['bytes'] / text['tokens']:.2f} bytes a token; {machine['usable_cores']} cores of {machine['cpu']}")
    print()
    first = next(iter(outcome.figures.values())).median
    rows = [(name, _rate(sample), f"{sample.median / first:.3g}") for name, sample in outcome.figures.items()]
    print_rows(rows, HEADS)
    print()


def _rate(sample: Sample) -> str:
    spread = f" ±{sample.spread / 2:.0%}" if len(sample.values) > 1 else ""
    return f"{sample.median / 1e6:,.1f}{spread}"
