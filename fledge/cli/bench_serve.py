"""`fledge bench serve`: the server under many clients, on long documents, and with many states held."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.measuring import measured
from fledge.cli.options import spread
from fledge.cli.terminal import note, print_heading, print_rows, visible

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
    folder: Annotated[str | None, typer.Option(help="Where states go; a folder in it is made and removed.")] = None

    def spec(self) -> Spec:
        """What to measure, checked."""
        from fledge.bench.serve import Spec

        lists = {name: _numbers(name, getattr(self, name)) for name in ("clients", "documents")}
        return Spec(**{**vars(self), **lists})


@spread
def serve(
    options: ServeOptions,
    record: Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this .png, .svg or .pdf.")] = None,
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
    for text in outcome.notes:
        note(f"note: {text}")
    print(json.dumps({"targets": outcome.targets}))


def _show(outcome: Outcome) -> None:
    print_heading(visible(outcome.model))
    heads = ("clients", "tokens/s", "engine alone", "overhead", "first token", "p95", "between tokens", "p95")
    print_rows([_row(load) for load in outcome.loads], heads)
    for found in outcome.documents:
        times = ", ".join(f"{name} {_ms(min(found[f'{name}_s']))}" for name in ("cold", "warm", "handle", "question"))
        print(f"{found['tokens']} tokens, to the first token: {times}")
    for target in outcome.targets:
        print(f"{'met   ' if target['met'] else 'missed'}  {target['name']}: {target['value']:.3g} ({target['limit']})")


def _row(load: dict[str, Any]) -> tuple[str, ...]:
    rates = (f"{load[key]['median']:,.0f}" for key in ("tokens_per_s", "engine_tokens_per_s"))
    times = [_ms(load[key][name]) if load[key] else "" for key in ("first_s", "gaps_s") for name in ("median", "p95")]
    return (f"{load['clients']}", *rates, f"{load['overhead']:.0%}", *times)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from fledge.core.errors import UsageError

    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"{name} is {text!r:.60}; give whole numbers, separated by commas") from None
