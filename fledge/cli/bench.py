"""`fledge bench`: speed on this machine, with other programs in the same run where they are installed."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fledge.cli import bench_cpu, bench_quality, bench_tokenizer
from fledge.cli.options import spread
from fledge.cli.samples import mebibytes, note_doubts, rate
from fledge.cli.terminal import SlowBar, print_rows, visible

if TYPE_CHECKING:
    from fledge.bench.generate import Outcome, Spec

HEADS = ("program", "prompt, tokens/s", "written, tokens/s", "peak memory", "load", "to first token")

app = typer.Typer(name="bench", add_completion=False)


@app.callback()
def bench() -> None:
    """Measure speed and memory on this machine."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured."""

    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A checkpoint or hub name. (default: the bundled model)")
    ] = None
    shape: Annotated[
        str | None, typer.Option(help="Instead of a model, a random Finch: L12-D768 is 12 layers of width 768.")
    ] = None
    vocab: Annotated[int, typer.Option(help="Vocabulary rows of the random model. (default: 65536)")] = 65536
    peer: Annotated[bool, typer.Option("--peer", help="Measure the package rwkv in the same run.")] = False
    dtypes: Annotated[str, typer.Option(help="Of the matrices, separated by commas. (default: fp32,bf16)")] = (
        "fp32,bf16"
    )
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt. (default: 512)")] = 512
    tokens: Annotated[int, typer.Option(help="Tokens to write after it. (default: 32)")] = 32
    repeats: Annotated[int, typer.Option(help="Processes for each program and dtype. (default: 5)")] = 5
    threads: Annotated[int | None, typer.Option(help="CPU threads. (default: as torch chooses)")] = None

    def spec(self) -> Spec:
        """What to measure, checked."""
        from fledge.bench.generate import Spec

        return Spec(**{**vars(self), "dtypes": tuple(self.dtypes.split(","))})


@app.command()
@spread
def generate(
    options: BenchOptions,
    record: Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")] = None,
) -> None:
    """Measure how fast a prompt is read and text is written, the peak memory and the time to load.

    The last line on standard output is one JSON object.
    """
    with SlowBar("preparing", per_second=1) as bar:
        from fledge.bench.generate import run
        from fledge.bench.harness import write_record

        outcome = run(options.spec(), bar.step)
    command = shlex.join(["fledge", *sys.argv[1:]])
    if record is not None:
        write_record(record, outcome.record(command))
    _show(outcome)
    note_doubts(outcome.machine, outcome.spec.repeats)
    medians = {
        configuration.name: {"prefill": figures.prefill.median, "decode": figures.decode.median}
        for configuration, figures in outcome.figures.items()
    }
    print(json.dumps({"tokens_per_s": medians, "ratios_to_the_best_peer": outcome.ratios()}))


def _show(outcome: Outcome) -> None:
    model, machine, spec = outcome.model, outcome.machine, outcome.spec
    name, stored = visible(model["name"]), model["file_dtype"]
    print(f"{model['family']} {name}, {model['parameters']:,} parameters, stored as {stored}")
    print(f"prompt of {spec.prompt} tokens, then {spec.tokens}; {model['threads']} threads of {machine['cpu']}")
    print()
    rows = []
    for configuration, figures in outcome.figures.items():
        rates = (rate(figures.prefill), rate(figures.decode))
        seconds = (f"{sample.median:.2f} s" for sample in (figures.load, figures.first_token))
        rows.append((configuration.name, *rates, mebibytes(figures.peak), *seconds))
    print_rows(rows, HEADS)
    print()
    for dtype, ratios in outcome.ratios().items():
        parts = ", ".join(f"{name.replace('_', ' ')} {ratio:.2f}x" for name, ratio in ratios.items())
        print(f"{dtype}: fledge against the best of rwkv: {parts} (above 1 is better)")


app.command()(bench_cpu.cpu)
app.command()(bench_cpu.plot)
app.command()(bench_tokenizer.tokenizer)
app.command()(bench_quality.quality)
