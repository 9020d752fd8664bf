"""`fledge bench tokenizer`: the speed of encoding, with installed packages in the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli.bench.runner import OutputOptions, RecordOption, run_suite
from fledge.cli.bench.tables import format_rate, print_notes
from fledge.cli.terminal import escape_controls, print_rows

if TYPE_CHECKING:
    from fledge.bench.tokenizer import TokenizerBenchmark

HEADS = ("program", "MB/s", "relative to the first")


def tokenizer(
    text: Annotated[
        Path | None,
        typer.Argument(help="A text file, a .jsonl file of documents, or a folder of them. (default: synthetic text)"),
    ] = None,
    megabytes: Annotated[float, typer.Option(help="Size of the text, at most. (default: 16)")] = 16.0,
    repeats: Annotated[int, typer.Option(help="Measurements of each program. (default: 5)")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads for batches, at most. (default: all cores)")] = None,
    record: RecordOption = None,
) -> None:
    """Measure tokenizers: one call per document, and batches with several threads.

    pyrwkv-tokenizer and rwkv are measured in the same run if they are installed. All must return the same ids.
    The last line on standard output is one JSON object.
    """

    def load() -> TokenizerBenchmark:
        from fledge.bench.tokenizer import TokenizerBenchmark

        return TokenizerBenchmark(text, megabytes, repeats, threads)

    result = run_suite(load, OutputOptions(record))
    sample, machine = result["text"], result["machine"]
    print(f"{escape_controls(sample['source'])}: {sample['documents']:,} documents, {sample['bytes']:,} bytes")
    per_token = sample["bytes"] / sample["tokens"]
    print(f"{per_token:.2f} bytes per token; {machine['usable_cores']} cores of {machine['cpu']}")
    print()
    rates = {name: metrics["bytes_per_s"] for name, metrics in result["figures"].items()}
    first = next(iter(rates.values()))["median"]
    print_rows([(name, format_rate(rate, 1e6), f"{rate['median'] / first:.3g}") for name, rate in rates.items()], HEADS)
    print()
    print_notes(result)
    ratio = result["ratio_to_the_fastest_peer"]
    medians = {name: round(rate["median"] / 1e6, 2) for name, rate in rates.items()}
    print(json.dumps({"megabytes_per_s": medians, "ratio_to_the_fastest_peer": ratio and round(ratio, 2)}))
