"""`fledge bench serve`: the server under many clients, on long documents, and with many stored states."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.bench.runner import OutputOptions, run_suite
from fledge.cli.bench.tables import print_failures, print_notes
from fledge.cli.options import parse_integers, spread
from fledge.cli.terminal import escape_controls, print_heading, print_rows

if TYPE_CHECKING:
    from fledge.bench.serve.benchmark import ServeBenchmark

PROGRAMS = {"": "server", "cached_": "server, cache", "peer_": "llama-cpp-python", "engine_": "engine alone"}
"""Prefix of the keys in a record -> program."""


@dataclass(frozen=True)
class ServeBenchmarkOptions:
    """What is measured."""

    model: Annotated[str | None, typer.Option(metavar="MODEL", help="A checkpoint. (default: the bundled one)")] = None
    shape: Annotated[str | None, typer.Option(help="A random Finch such as L12-D768 instead.")] = None
    clients: Annotated[str, typer.Option(help="Numbers separated by commas. (default: 1,4,16,32)")] = "1,4,16,32"
    tokens: Annotated[int, typer.Option(help="Tokens per response. (default: 128)")] = 128
    documents: Annotated[
        str, typer.Option(help="Tokens, separated by commas; empty: none. (default: 2048,8192,32768)")
    ] = "2048,8192,32768"
    states: Annotated[int, typer.Option(help="Stored states; 0: none. (default: 10000)")] = 10_000
    resumed: Annotated[int, typer.Option(help="Number of states to resume from. (default: 100)")] = 100
    repeats: Annotated[int, typer.Option(help="Runs of each load. (default: 3)")] = 3
    peer: Annotated[bool, typer.Option(help="llama-cpp-python's server with the same weights, if installed.")] = True
    folder: Annotated[str | None, typer.Option(help="Parent of a temporary folder for the states.")] = None

    def benchmark(self) -> ServeBenchmark:
        """Return the benchmark, with valid settings."""
        from fledge.bench.serve.benchmark import ServeBenchmark

        lists = {name: parse_integers(name, getattr(self, name), allow_empty=True) for name in ("clients", "documents")}
        return ServeBenchmark(**{**vars(self), **lists})


@spread
def serve(options: ServeBenchmarkOptions, output: OutputOptions) -> None:
    """Measure the server: concurrent clients, questions on long documents, stored states.

    The last line on standard output is one JSON object.
    """
    record = run_suite(options.benchmark, output)
    _print_tables(record)
    rates = [load.get(f"{prefix}tokens_per_s") for load in record["loads"] for prefix in PROGRAMS]
    print_notes(record, rates)
    print(json.dumps({"targets": record["targets"]}))


def _print_tables(record: Mapping[str, Any]) -> None:
    print_heading(escape_controls(record["model"]))
    heads = ("clients", "program", "tokens/s", "first token", "p95", "between events", "p95")
    print_rows([row for load in record["loads"] for row in _rows(load)], heads)
    failures = {f"{load['clients']} clients, llama-cpp-python": load for load in record["loads"]}
    print_failures(failures, "peer_error")
    for document in record["documents"]:
        names = [name[:-2] for name in document if name.endswith("_s")]
        times = [f"{name.replace('_', ' ')} {_ms(statistics.median(document[f'{name}_s']))}" for name in names]
        failure = f", llama-cpp-python failed: {document['peer_error']}" if "peer_error" in document else ""
        print(escape_controls(f"{document['tokens']} tokens, to the first token: {', '.join(times)}{failure}"))
    if record["targets"]:
        print()
        rows = [_target_row(target) for target in record["targets"]]
        print_rows(rows, ("target", "limit", "measured", "result"))


def _target_row(target: Mapping[str, Any]) -> tuple[str, ...]:
    limit, result = f"{target['limit']:g}", "met" if target["met"] else "missed"
    return (target["name"], limit, f"{target['value']:.3g}", result)


def _rows(load: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (f"{load['clients']}", name, f"{load[f'{prefix}tokens_per_s']['median']:,.0f}", *_latencies(load, prefix))
        for prefix, name in PROGRAMS.items()
        if f"{prefix}tokens_per_s" in load
    ]


def _latencies(load: Mapping[str, Any], prefix: str) -> list[str]:
    times = [load.get(prefix + key) for key in ("first_s", "gaps_s")]
    return [_ms(values[name]) if values else "" for values in times for name in ("median", "p95")]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
