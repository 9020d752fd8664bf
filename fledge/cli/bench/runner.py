"""Run a benchmark from the command line: a progress bar, a record that is saved after each part, and a plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.command_line import command_line
from fledge.cli.terminal import SlowBar

if TYPE_CHECKING:
    from fledge.bench.suite import Benchmark

RecordOption = Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")]


@dataclass(frozen=True)
class OutputOptions:
    """The files that a benchmark writes."""

    record: RecordOption = None
    plot: Annotated[
        Path | None, typer.Option(help="Draw the result into this .png, .svg or .pdf (needs matplotlib).")
    ] = None


def run_suite(load: Callable[[], Benchmark], output: OutputOptions, unit: str = "") -> dict[str, Any]:
    """Run a benchmark and return its record. The path of the plot is checked before anything is measured.

    load: creates the benchmark. It is called while the bar is visible, because its imports take seconds.
    unit: of the progress.
    """
    from fledge.core.files import write_json

    def save(record: dict[str, Any]) -> None:
        if output.record is not None:
            write_json(output.record, record)

    with SlowBar("preparing", unit, per_second=1) as bar:
        from fledge.bench.suite import run_benchmark

        if output.plot is not None:
            from fledge.bench.plot import check_plottable

            check_plottable(output.plot)
        record = run_benchmark(load(), command_line(), bar.step, save)
    if output.plot is not None:
        from fledge.bench.plot import draw

        draw(record, output.plot)
    return record
