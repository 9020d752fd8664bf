"""`fledge bench train`: speed and memory of training by length of context, beside a transformer of equal size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.measuring import measured
from fledge.cli.options import spread, whole_numbers
from fledge.cli.samples import mebibytes, note_worth, rate
from fledge.cli.terminal import print_heading, print_rows, visible

if TYPE_CHECKING:
    from fledge.bench.train import Outcome, Spec
    from fledge.bench.train_figures import Case, Group


@dataclass(frozen=True)
class TrainOptions:
    """What is measured."""

    shape: Annotated[str, typer.Option(help="L6-D256 is 6 layers of width 256. (default: L6-D256)")] = "L6-D256"
    family: Annotated[str, typer.Option(help="finch or eagle. (default: finch)")] = "finch"
    vocab: Annotated[int, typer.Option(help="Vocabulary rows. (default: 8192)")] = 8192
    lengths: Annotated[
        str, typer.Option(help="Tokens of context, separated by commas. (default: 512 to 16384, doubling)")
    ] = "512,1024,2048,4096,8192,16384"
    tokens: Annotated[int, typer.Option(help="Of a step, whatever the length. (default: 16384)")] = 16384
    dtypes: Annotated[
        str, typer.Option(help="Of the matrix products: fp32, bf16 or both, separated by commas. (default: both)")
    ] = "fp32,bf16"
    loop: Annotated[
        int, typer.Option(help="The longest context for the loop token by token; 0 leaves it out. (default: 1024)")
    ] = 1024
    kernel: Annotated[
        bool, typer.Option("--kernel/--no-kernel", help="Measure the recurrence alone, too. (default: yes)")
    ] = True
    passing: Annotated[
        int, typer.Option(help="Tokens of a row read with the state carried on; 0 leaves it out. (default: 65536)")
    ] = 65536
    steps: Annotated[int, typer.Option(help="Of each process, after one that does not count. (default: 2)")] = 2
    repeats: Annotated[int, typer.Option(help="Processes for each program and length. (default: 3)")] = 3
    threads: Annotated[int | None, typer.Option(help="CPU threads. (default: as torch chooses)")] = None
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda. (default: a GPU if there is one)")
    ] = None

    def spec(self) -> Spec:
        """What to measure, checked."""
        from fledge.bench.train import Spec

        lengths = whole_numbers("lengths", self.lengths)
        return Spec(**{**vars(self), "lengths": lengths, "dtypes": tuple(self.dtypes.split(","))})


@spread
def train(
    options: TrainOptions,
    record: Annotated[Path | None, typer.Option(help="Write everything to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this .png, .svg or .pdf.")] = None,
) -> None:
    """Measure training steps of an RWKV and of a transformer of the same size, by length of context.

    The last line on standard output is one JSON object.
    """

    def load() -> Any:
        from fledge.bench.train import run
        from fledge.bench.train_plot import draw

        return run, draw

    outcome: Outcome = measured(load, options.spec, record, plot)
    _show(outcome)
    rates = [found.rate for group in outcome.groups for found in group.figures.values()]
    note_worth(outcome.notes, outcome.machine, outcome.spec.repeats, rates)
    print(json.dumps(_summary(outcome)))


def _show(outcome: Outcome) -> None:
    facts, family = outcome.record("")["models"], outcome.spec.family
    sizes = "; ".join(f"{model['family']} {model['parameters']:,} parameters" for model in facts.values())
    print_heading(visible(f"{outcome.spec.shape}: {sizes}"))
    where = outcome.gpu or f"{outcome.threads} threads of {outcome.machine['cpu']}"
    print(f"{outcome.spec.tokens} tokens a step; {where}")
    for kernel in outcome.kernels:
        B, T, H, N = kernel.shape
        gains = ", ".join(f"{backend} {gain:.1f}x" for backend, gain in kernel.gains.items())
        print(f"the recurrence alone, {B} x {T} tokens, {H} heads of {N}: {gains} the loop")
    if outcome.growth is not None:
        short, long = sorted(outcome.passing)
        peak = mebibytes(outcome.passing[long])
        print(f"state passing: a row of {long:,} tokens peaks at {peak}, {outcome.growth:+.1%} to {short:,}")
    heads = ("context", "products", "program", "tokens/s", f"{family} to it", "forward", "backward", "update")
    rows = [_row(group, case, family) for group in outcome.groups for case in group.figures]
    print()
    print_rows(rows, (*heads, "peak memory", "GFLOP/s"))
    print()


def _row(group: Group, case: Case, family: str) -> tuple[str, ...]:
    found = group.figures[case]
    ratio = group.targets(family).get(f"rate_to_{case.program}")
    return (
        f"{case.length}",
        case.dtype,
        case.program,
        rate(found.rate),
        "" if ratio is None else f"{ratio:.2f}x",
        *(f"{part.median:.2f} s" for part in (found.forward, found.backward, found.update)),
        mebibytes(found.peak),
        f"{found.operations_per_s / 1e9:,.0f} ({found.operations_per_s / group.product.median:.0%})",
    )


def _summary(outcome: Outcome) -> dict[str, Any]:
    family = outcome.spec.family
    return {
        "targets": {f"{group.dtype} {group.length}": group.targets(family) for group in outcome.groups},
        "passing_growth": outcome.growth,
        "kernel_to_loop": {str(kernel.shape[0]): kernel.gains for kernel in outcome.kernels},
    }
