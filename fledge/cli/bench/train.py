"""`fledge bench train`: speed and memory of training by context length, with a transformer of equal size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.bench.runner import OutputOptions, run_suite
from fledge.cli.bench.tables import format_memory, format_rate, print_failures, print_notes
from fledge.cli.options import parse_integers, spread
from fledge.cli.terminal import escape_controls, print_heading, print_rows

if TYPE_CHECKING:
    from fledge.bench.train.benchmark import TrainBenchmark


@dataclass(frozen=True)
class TrainBenchmarkOptions:
    """What is measured."""

    shape: Annotated[str, typer.Option(help="L6-D256 is 6 layers of width 256. (default: L6-D256)")] = "L6-D256"
    family: Annotated[str, typer.Option(help="finch or eagle. (default: finch)")] = "finch"
    vocab: Annotated[int, typer.Option(help="Vocabulary size. (default: 8192)")] = 8192
    lengths: Annotated[
        str, typer.Option(help="Tokens of context, separated by commas. (default: 512 to 16384, doubling)")
    ] = "512,1024,2048,4096,8192,16384"
    tokens: Annotated[int, typer.Option(help="Tokens per step, at every length. (default: 16384)")] = 16384
    dtypes: Annotated[
        str, typer.Option(help="Of the matrix products: fp32, bf16 or both, separated by commas. (default: both)")
    ] = "fp32,bf16"
    loop: Annotated[
        int, typer.Option(help="The longest context for the loop token by token; 0 leaves it out. (default: 1024)")
    ] = 1024
    kernel: Annotated[
        bool, typer.Option("--kernel/--no-kernel", help="Also measure the recurrence alone. (default: yes)")
    ] = True
    passing: Annotated[
        int, typer.Option(help="Tokens of a row trained with state passing; 0 leaves it out. (default: 65536)")
    ] = 65536
    steps: Annotated[int, typer.Option(help="Steps per process, after a warm-up step. (default: 2)")] = 2
    repeats: Annotated[int, typer.Option(help="Processes for each program and length. (default: 3)")] = 3
    threads: Annotated[int | None, typer.Option(help="CPU threads. (default: torch's default)")] = None
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda. (default: a GPU if there is one)")
    ] = None

    def benchmark(self) -> TrainBenchmark:
        """Return the benchmark, with valid settings."""
        from fledge.bench.train.benchmark import TrainBenchmark

        lengths = parse_integers("lengths", self.lengths)
        return TrainBenchmark(**{**vars(self), "lengths": lengths, "dtypes": tuple(self.dtypes.split(","))})


@spread
def train(options: TrainBenchmarkOptions, output: OutputOptions) -> None:
    """Measure training steps of an RWKV and of a transformer of the same size, by context length.

    The last line on standard output is one JSON object.
    """
    from fledge.bench.train.metrics import passing_growth

    record = run_suite(options.benchmark, output)
    growth = passing_growth(record)
    _print_tables(record, growth)
    programs = [program for group in record["groups"] for program in group["programs"].values()]
    print_notes(record, [program.get("tokens_per_s") for program in programs])
    summary = {
        "targets": {f"{group['dtype']} {group['length']}": group["targets"] for group in record["groups"]},
        "passing_growth": growth,
        "kernel_to_loop": {str(kernel["shape"][0]): kernel["times_the_loop"] for kernel in record["kernel"]},
    }
    print(json.dumps(summary))


def _print_tables(record: Mapping[str, Any], growth: float | None) -> None:
    settings = record["settings"]
    sizes = [f"{model['family']} {model['parameters']:,} parameters" for model in record["models"].values()]
    print_heading(escape_controls(f"{settings['shape']}: {'; '.join(sizes)}"))
    on_cpu = record["device"] == "cpu"
    device = f"{record['threads']} threads of {record['machine']['cpu']}" if on_cpu else record["device"]
    print(f"{settings['tokens']} tokens per step; {device}")
    for kernel in record["kernel"]:
        B, T, H, N = kernel["shape"]
        gains = ", ".join(f"{backend} {gain:.1f}x" for backend, gain in kernel["times_the_loop"].items())
        print(f"the recurrence alone, {B} x {T} tokens, {H} heads of {N}: {gains} the speed of the loop")
    if growth is not None:
        peaks = record["passing"]["peak_bytes"]
        short, long = sorted(peaks, key=int)
        print(
            f"state passing: peak memory of {format_memory(peaks[long])} at {long:,} tokens, {growth:+.1%} to {short:,}"
        )
    family = settings["family"]
    heads = ("context", "products", "program", "tokens/s", f"{family} to it", "forward", "backward", "update")
    rows = [
        _row(group, name, program)
        for group in record["groups"]
        for name, program in group["programs"].items()
        if "error" not in program
    ]
    print()
    print_rows(rows, (*heads, "peak memory", "GFLOP/s"))
    for group in record["groups"]:
        prefix = f"{group['length']}  {group['dtype']}"
        print_failures({f"{prefix}  {name}": program for name, program in group["programs"].items()})
    print()


def _row(group: Mapping[str, Any], name: str, program: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = group["targets"].get(f"rate_to_{name}")
    return (
        f"{group['length']}",
        group["dtype"],
        name,
        format_rate(program["tokens_per_s"]),
        "" if ratio is None else f"{ratio:.2f}x",
        *(f"{program[part]['median']:.2f} s" for part in ("forward_s", "backward_s", "update_s")),
        format_memory(program["peak_bytes"]),
        f"{program['operations_per_s'] / 1e9:,.0f} ({program['share_of_product']:.0%})",
    )
