"""`fledge bench cpu`: Fledge and the baselines on this CPU, compared with the limits of the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.bench.runner import OutputOptions, run_suite
from fledge.cli.bench.tables import format_memory, format_rate, print_failures, print_notes
from fledge.cli.options import spread
from fledge.cli.terminal import escape_controls, print_heading, print_rows

if TYPE_CHECKING:
    from fledge.bench.cpu.benchmark import CpuBenchmark

TARGETS = ("prefill", "decode", "batch", "first_token", "peak")
ARITHMETIC_LABELS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int16"}
RATES = ("prefill", "decode", "batch")


@dataclass(frozen=True)
class CpuBenchmarkOptions:
    """What is measured."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="A checkpoint or hub name.")] = None
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A random model instead: L12-D768 is 12 layers of width 768. Several shapes, separated by commas or "
            "in several options, are measured one after the other. (default: L12-D768)"
        ),
    ] = None
    family: Annotated[str, typer.Option(help="Family of random models: finch or eagle. (default: finch)")] = "finch"
    vocab: Annotated[int, typer.Option(help="Vocabulary size of random models. (default: 65536)")] = 65536
    widths: Annotated[
        str, typer.Option(help="Of the weights: fp32, bf16, int8, int4, separated by commas. (default: all but fp32)")
    ] = "bf16,int8,int4"
    peers: Annotated[
        bool,
        typer.Option("--peers/--no-peers", help="Measure rwkv and llama.cpp if they are installed. (default: yes)"),
    ] = True
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt. (default: 512)")] = 512
    tokens: Annotated[int, typer.Option(help="Tokens to decode after it. (default: 32)")] = 32
    batch: Annotated[int, typer.Option(help="Batch size; 1 leaves the batch out. (default: 16)")] = 16
    repeats: Annotated[int, typer.Option(help="Processes for each program and width. (default: 5)")] = 5
    threads: Annotated[int | None, typer.Option(help="CPU threads. (default: torch's default)")] = None
    cache: Annotated[str | None, typer.Option(metavar="FOLDER", help="Keep the model files here, for another run.")] = (
        None
    )

    def benchmark(self) -> CpuBenchmark:
        """Return the benchmark, with valid settings."""
        from fledge.bench.cpu.benchmark import CpuBenchmark

        shapes = tuple(shape for option in self.shape or () for shape in option.split(","))
        values = {name: value for name, value in vars(self).items() if name != "shape"}
        return CpuBenchmark(**{**values, "shapes": shapes, "widths": tuple(self.widths.split(","))})


@spread
def cpu(options: CpuBenchmarkOptions, output: OutputOptions) -> None:
    """Measure Fledge and the baselines in one run, and how much of this machine's limits they use.

    All programs have the same weights and prompt. The last line on standard output is one JSON object.
    """
    record = run_suite(options.benchmark, output)
    for block in record["models"]:
        _print_model(block, record)
    cases = [case for block in record["models"] for case in block["figures"].values()]
    print_notes(record, [case.get(f"{name}_tokens_per_s") for case in cases for name in RATES])
    print(json.dumps({block["model"]["name"]: _medians(block) for block in record["models"]}))


def _print_model(block: dict[str, Any], record: dict[str, Any]) -> None:
    model, settings = block["model"], record["settings"]
    print_heading(escape_controls(f"{model['family']} {model['name']}, {model['parameters']:,} parameters"))
    cpu_name = record["machine"]["cpu"]
    print(
        f"prompt of {settings['prompt']} tokens, then {settings['tokens']}; {record['threads']} threads of {cpu_name}"
    )
    print(f"limits: {', '.join(_format_limits(block['limits']))}")
    print()
    batch = settings["batch"]
    heads = ("program", "prefill, tokens/s", "GFLOP/s", "decode, tokens/s", "GB/s", f"batch of {batch}, tokens/s")
    measured = {name: case for name, case in block["figures"].items() if "error" not in case}
    rows = [_row(name, case) for name, case in measured.items()]
    print_rows(rows, (*heads, "peak memory", "load", "to first token"))
    print_failures(block["figures"])
    print()
    for width, targets in block["targets"].items():
        print(f"{width}: {'; '.join(_format_targets(targets, batch))}")
    print()


def _format_limits(limits: Mapping[str, Any]) -> list[str]:
    from fledge.bench.machine_limits import operations_limit, read_limit

    reading = read_limit(limits)
    parts = [f"{reading / 1e9:,.1f} GB/s read"] if reading else []
    for width, label in ARITHMETIC_LABELS.items():
        operations = operations_limit(limits, width)
        if operations is not None:
            parts.append(f"{operations / 1e9:,.0f} GFLOP/s {label}")
    return parts


def _row(name: str, case: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        format_rate(case["prefill_tokens_per_s"]),
        _with_share(f"{case['prefill_operations_per_s'] / 1e9:,.0f}", case["share_of_arithmetic"]),
        format_rate(case["decode_tokens_per_s"]),
        _with_share(f"{case['decode_bytes_per_s'] / 1e9:,.1f}", case["share_of_reading"]),
        format_rate(case["batch_tokens_per_s"]),
        format_memory(case["peak_bytes"]),
        f"{case['load_s']['median']:.2f} s",
        f"{case['first_token_s']['median']:.2f} s",
    )


def _with_share(number: str, share: float | None) -> str:
    return number if share is None else f"{number} ({share:.0%})"


def _format_targets(targets: Mapping[str, Any], batch: int) -> list[str]:
    parts = []
    for key, name in (("to_llama.cpp", "llama.cpp"), ("to_the_best_rwkv", "the best of rwkv")):
        ratios = [f"{what.replace('_', ' ')} {targets[key][what]:.2f}x" for what in TARGETS if what in targets[key]]
        if ratios:
            parts.append(f"compared with {name}: {', '.join(ratios)}")
    shares = ("share_of_reading", "of the memory bandwidth"), ("share_of_arithmetic", "of the arithmetic")
    parts += [f"{targets[key]:.0%} {name}" for key, name in shares if targets[key] is not None]
    if targets["batch_gain"] is not None:
        parts.append(f"batch of {batch}: {targets['batch_gain']:.1f}x the throughput of one text")
    return parts


def _medians(block: Mapping[str, Any]) -> dict[str, Any]:
    rates = {
        name: {"error": case["error"]}
        if "error" in case
        else {rate: (summary := case[f"{rate}_tokens_per_s"]) and summary["median"] for rate in RATES}
        for name, case in block["figures"].items()
    }
    return {"tokens_per_s": rates, "targets": block["targets"]}
