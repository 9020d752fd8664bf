"""`fledge bench serve`: the server under many clients, on long documents, and with many states held."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.measuring import measured
from fledge.cli.options import spread, whole_numbers
from fledge.cli.samples import note_worth
from fledge.cli.terminal import print_heading, print_rows, visible

if TYPE_CHECKING:
    from fledge.bench.serve import Outcome, Spec


@dataclass(frozen=True)
class ServeOptions:
    """What is measured."""

    model: Annotated[str | None, typer.Option(metavar="MODEL", help="A checkpoint. (default: the bundled one)")] = None
    shape: Annotated[str | None, typer.Option(help="A random Finch such as L12-D768 in its place.")] = None
    clients: Annotated[str, typer.Option(help="Separated by commas. (default: 1,4,16,32)")] = "1,4,16,32"
    tokens: Annotated[int, typer.Option(help="Of an answer. (default: 128)")] = 128
    documents: Annotated[
        str, typer.Option(help="Tokens, separated by commas; empty: none. (default: 2048,8192,32768)")
    ] = "2048,8192,32768"
    states: Annotated[int, typer.Option(help="Held at once; 0: none. (default: 10000)")] = 10_000
    resumed: Annotated[int, typer.Option(help="How many of them are gone on from. (default: 100)")] = 100
    repeats: Annotated[int, typer.Option(help="Of every load. (default: 3)")] = 3
    peer: Annotated[bool, typer.Option(help="llama-cpp-python's server on the same weights, where installed.")] = True
    folder: Annotated[str | None, typer.Option(help="Where states go; a folder in it is made and removed.")] = None

    def spec(self) -> Spec:
        """What to measure, checked."""
        from fledge.bench.serve import Spec

        lists = {name: whole_numbers(name, getattr(self, name), gaps=True) for name in ("clients", "documents")}
        return Spec(**{**vars(self), **lists})


@spread
def serve(
    options: ServeOptions,
    record: Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the result into this .png, .svg or .pdf (needs `fledge[bench]`).")
    ] = None,
) -> None:
    """Measure the server: clients at once, questions on long documents, states held.

    The last line on standard output is one JSON object.
    """

    def load() -> Any:
        from fledge.bench.serve import run
        from fledge.bench.serve_plot import draw

        return run, draw

    outcome: Outcome = measured(load, options.spec, record, plot)
    _show(outcome)
    note_worth(outcome.notes, outcome.machine, outcome.spec.repeats, outcome.rates)
    print(json.dumps({"targets": outcome.targets}))


def _show(outcome: Outcome) -> None:
    print_heading(visible(outcome.model))
    heads = ("clients", "program", "tokens/s", "first token", "p95", "between events", "p95")
    print_rows([row for load in outcome.loads for row in _rows(load)], heads)
    for found in outcome.documents:
        names = [name[:-2] for name in found if name.endswith("_s")]
        times = ", ".join(f"{name.replace('_', ' ')} {_ms(statistics.median(found[f'{name}_s']))}" for name in names)
        print(f"{found['tokens']} tokens, to the first token: {times}")
    for target in outcome.targets:
        print(f"{'met   ' if target['met'] else 'missed'}  {target['name']}: {target['value']:.3g} ({target['limit']})")


def _rows(load: dict[str, Any]) -> list[tuple[str, ...]]:
    """One for each program."""
    programs = {"": "server", "cached_": "server, cache", "peer_": "llama-cpp-python", "engine_": "engine alone"}
    return [
        (f"{load['clients']}", name, f"{load[f'{prefix}tokens_per_s']['median']:,.0f}", *_columns(load, prefix))
        for prefix, name in programs.items()
        if f"{prefix}tokens_per_s" in load
    ]


def _columns(load: dict[str, Any], prefix: str) -> list[str]:
    times = [load.get(prefix + key) for key in ("first_s", "gaps_s")]
    return [_ms(found[name]) if found else "" for found in times for name in ("median", "p95")]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
