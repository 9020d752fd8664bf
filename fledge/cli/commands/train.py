"""`fledge train`: train a model from a recipe and a token store, with a progress view and a plot of the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.options import spread
from fledge.cli.terminal import escape_controls, message_console, print_note, print_rows
from fledge.cli.views.training import format_line
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.train.metrics import Line
    from fledge.train.recipe import Recipe

app = typer.Typer(name="train", add_completion=False)


@dataclass(frozen=True)
class TrainOptions:
    """The options of `fledge train`."""

    data: Annotated[str, typer.Option(metavar="STORE", help="The token store: a folder, or the prefix of a binidx.")]
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for checkpoints, metrics and the finished model.")]
    set: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Change a setting; may be repeated.")] = (
        None
    )
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Start with these weights: a checkpoint, or tiny-finch."),
    ] = None
    parallel: Annotated[str, typer.Option(help="Under torchrun: ddp or fsdp. (default: ddp)")] = "ddp"
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps. (default: a GPU if there is one)")] = None
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write the metrics for TensorBoard into the folder.")
    ] = False


@app.command()
@spread
def train(
    recipe: Annotated[str, typer.Argument(help="The name of a recipe, or file.py:function.")],
    options: TrainOptions,
    show: Annotated[bool, typer.Option("--show", help="Print all settings without training.")] = False,
) -> None:
    """Train a model, or continue an earlier run in the same folder.

    Ctrl-C and SIGTERM end the run after the current step, which is saved. With several processes:
    torchrun --nproc-per-node 2 -m fledge train ...
    """
    from fledge.train.builtin_recipes import find_recipe

    settings = find_recipe(recipe).changed(dict(_parse_setting(text) for text in options.set or ()))
    if show:
        print_rows([(name, str(value)) for name, value in vars(settings).items()])
        return
    from fledge.engine.llm.loading import locate_checkpoint
    from fledge.train.distributed import join
    from fledge.train.run import run

    start = None if options.start is None else locate_checkpoint(options.start)
    with (
        join(options.parallel, options.device) as distributed,
        _open_reports(settings, options, distributed.is_main) as report,
    ):
        result = run(
            settings,
            options.data,
            options.to,
            report,
            start=start,
            distributed=distributed,
            device=options.device,
        )
    if distributed.is_main:
        _plot(options.to)
        print(escape_controls(str(result)))


def _parse_setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set needs NAME=VALUE, not {text!r}")
    return name.strip(), value.strip()


@contextlib.contextmanager
def _open_reports(recipe: Recipe, options: TrainOptions, is_main: bool) -> Iterator[Callable[[Line], None]]:
    """The function that receives every line of metrics. It updates the view in a terminal, or prints the line, and it
    writes for TensorBoard if requested."""
    with contextlib.ExitStack() as stack:
        if not is_main:
            yield lambda line: None
            return
        sinks: list[Callable[[Line], None]] = []
        if message_console().is_terminal:
            from fledge.cli.views.training import TrainView

            sinks.append(stack.enter_context(TrainView(recipe.steps)))
        else:
            sinks.append(lambda line: print_note(format_line(line)))
        if options.tensorboard:
            sinks.append(_open_tensorboard(options.to, stack))

        def report(line: Line) -> None:
            for sink in sinks:
                sink(line)

        yield report


def _open_tensorboard(folder: Path, stack: contextlib.ExitStack) -> Callable[[Line], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError('TensorBoard is not installed; run `pip install "fledge[train]"`') from None
    writer: Any = SummaryWriter(str(folder / "tensorboard"))
    stack.callback(writer.close)

    def write(line: Line) -> None:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(name, value, int(line["step"]))

    return write


def _plot(folder: Path) -> None:
    """Write the plot of the losses if matplotlib is installed."""
    try:
        from fledge.train.plot import plot_losses
    except ImportError:
        print_note('note: matplotlib is not installed; for a plot of the loss, run `pip install "fledge[train]"`')
        return
    plot_losses(folder / "metrics.jsonl", folder / "loss.png")
