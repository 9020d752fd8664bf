"""`fledge bench cpu`: this program and others on this CPU, beside what the machine can do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.measuring import measured
from fledge.cli.options import spread
from fledge.cli.samples import mebibytes, note_worth, rate
from fledge.cli.terminal import print_heading, print_rows, visible

if TYPE_CHECKING:
    from fledge.bench.cpu import Outcome, Spec
    from fledge.bench.cpu_figures import Block, Case

TARGETS = ("prefill", "decode", "batch", "first_token", "peak")
ALIKE = {"fp32": "float32", "bf16": "bfloat16"}  # widths -> how their arithmetic is called in a line of limits


@dataclass(frozen=True)
class CpuOptions:
    """What is measured."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="A checkpoint or hub name.")] = None
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of a model, a random one: L12-D768 is 12 layers of width 768. Several, separated by commas "
            "or given again, are measured one after the other. (default: L12-D768)"
        ),
    ] = None
    family: Annotated[str, typer.Option(help="Of random models: finch or eagle. (default: finch)")] = "finch"
    vocab: Annotated[int, typer.Option(help="Vocabulary rows of random models. (default: 65536)")] = 65536
    widths: Annotated[
        str, typer.Option(help="Of the weights: fp32, bf16, int8, int4, separated by commas. (default: all but fp32)")
    ] = "bf16,int8,int4"
    peers: Annotated[
        bool,
        typer.Option("--peers/--no-peers", help="Measure rwkv and llama.cpp where they are installed. (default: yes)"),
    ] = True
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt. (default: 512)")] = 512
    tokens: Annotated[int, typer.Option(help="Tokens to write after it. (default: 32)")] = 32
    batch: Annotated[int, typer.Option(help="Texts to write at once; 1 leaves that out. (default: 16)")] = 16
    repeats: Annotated[int, typer.Option(help="Processes for each program and width. (default: 5)")] = 5
    threads: Annotated[int | None, typer.Option(help="CPU threads. (default: as torch chooses)")] = None
    cache: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Keep the models' files here, for another run.")
    ] = None

    def spec(self) -> Spec:
        """What to measure, checked."""
        from fledge.bench.cpu import Spec

        shapes = tuple(shape for given in self.shape or () for shape in given.split(","))
        values = {name: value for name, value in vars(self).items() if name != "shape"}
        return Spec(**{**values, "shapes": shapes, "widths": tuple(self.widths.split(","))})


@spread
def cpu(
    options: CpuOptions,
    record: Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this .png, .svg or .pdf.")] = None,
) -> None:
    """Measure this program and others in one run, and how much of this machine's limits they use.

    Every program gets the same weights and prompt. The last line on standard output is one JSON object.
    """

    def load() -> Any:
        from fledge.bench.cpu import run
        from fledge.bench.cpu_plot import draw

        return run, draw

    outcome: Outcome = measured(load, options.spec, record, plot)
    for block in outcome.blocks:
        _show(block, outcome)
    figures = [found for block in outcome.blocks for found in block.figures.values()]
    rates = [sample for found in figures for sample in (found.prefill, found.decode, found.batch) if sample]
    note_worth(outcome.notes, outcome.machine, outcome.spec.repeats, rates)
    print(json.dumps({block.model["name"]: _medians(block) for block in outcome.blocks}))


def _show(block: Block, outcome: Outcome) -> None:
    model, spec, threads = block.model, outcome.spec, outcome.threads
    print_heading(visible(f"{model['family']} {model['name']}, {model['parameters']:,} parameters"))
    print(f"prompt of {spec.prompt} tokens, then {spec.tokens}; {threads} threads of {outcome.machine['cpu']}")
    print(f"limits: {', '.join(_limits(block))}")
    print()
    heads = ("program", "prompt, tokens/s", "GFLOP/s", "one text, tokens/s", "GB/s", f"{spec.batch} texts, tokens/s")
    rows = [_row(block, case) for case in block.figures]
    print_rows(rows, (*heads, "peak memory", "load", "to first token"))
    print()
    for width, targets in block.targets().items():
        print(f"{width}: {'; '.join(_targets(targets, spec.batch))}")
    print()


def _limits(block: Block) -> list[str]:
    limits = block.limits
    found = [f"{limits.read.median / 1e9:,.1f} GB/s read"] if limits.read else []
    for width in ("fp32", "bf16", "int8"):
        operations = limits.operations_per_s(width)
        if operations is not None:
            found.append(f"{operations / 1e9:,.0f} GFLOP/s {ALIKE.get(width, 'int16')}")
    return found


def _row(block: Block, case: Case) -> tuple[str, ...]:
    figures = block.figures[case]
    return (
        case.name,
        rate(figures.prefill),
        _with_share(f"{block.operations_per_s(case) / 1e9:,.0f}", block.share_of_arithmetic(case)),
        rate(figures.decode),
        _with_share(f"{block.bytes_per_s(case) / 1e9:,.1f}", block.share_of_reading(case)),
        rate(figures.batch),
        mebibytes(figures.peak),
        f"{figures.load.median:.2f} s",
        f"{figures.first_token.median:.2f} s",
    )


def _with_share(number: str, share: float | None) -> str:
    return number if share is None else f"{number} ({share:.0%})"


def _targets(targets: dict[str, Any], batch: int) -> list[str]:
    """The ratios and shares of one width as parts of a sentence."""
    parts = []
    for key, name in (("to_llama.cpp", "llama.cpp"), ("to_the_best_rwkv", "the best of rwkv")):
        ratios = [f"{what.replace('_', ' ')} {targets[key][what]:.2f}x" for what in TARGETS if what in targets[key]]
        if ratios:
            parts.append(f"against {name} {', '.join(ratios)}")
    shares = ("share_of_reading", "of the memory's speed"), ("share_of_arithmetic", "of the arithmetic")
    parts += [f"{targets[key]:.0%} {name}" for key, name in shares if targets[key] is not None]
    if targets["batch_gain"] is not None:
        parts.append(f"{batch} texts {targets['batch_gain']:.1f}x one")
    return parts


def _medians(block: Block) -> dict[str, Any]:
    rates = {
        case.name: {
            "prefill": figures.prefill.median,
            "decode": figures.decode.median,
            "batch": figures.batch.median if figures.batch else None,
        }
        for case, figures in block.figures.items()
    }
    return {"tokens_per_s": rates, "targets": block.targets()}
