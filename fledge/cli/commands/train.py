"""`fledge train`: a recipe and a token store in, a model out; what it is doing meanwhile, and the loss as a picture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.options import spread
from fledge.cli.terminal import escape_controls, message_console, print_note, print_rows
from fledge.cli.views.training import as_text
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.train.metrics import Line
    from fledge.train.recipe import Recipe

app = typer.Typer(name="train", add_completion=False)


@dataclass(frozen=True)
class TrainOptions:
    """Where everything is, and what is not as the recipe says."""

    data: Annotated[str, typer.Option(metavar="STORE", help="The token store: a folder, or the prefix of a binidx.")]
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="The run: checkpoints, metrics, the finished model.")]
    set: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Change a setting; may be repeated.")] = (
        None
    )
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Begin with these weights: a checkpoint, or tiny-finch."),
    ] = None
    parallel: Annotated[str, typer.Option(help="Under torchrun: ddp or fsdp. (default: ddp)")] = "ddp"
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. (default: the best that is there)")] = None
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files into the folder.")] = (
        False
    )


@app.command()
@spread
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or file.py:function.")],
    options: TrainOptions,
    show: Annotated[bool, typer.Option("--show", help="Print every setting, and train nothing.")] = False,
) -> None:
    """Train a model, or continue where an earlier call with the same folder has stopped.

    Ctrl-C (also SIGTERM) ends the run after the present step, which is saved. With several processes:
    torchrun --nproc-per-node 2 -m fledge train ...
    """
    from fledge.train.builtin_recipes import find_recipe

    chosen = find_recipe(recipe).changed(dict(_pair(text) for text in options.set or ()))
    if show:
        print_rows([(name, str(value)) for name, value in vars(chosen).items()])
        return
    from fledge.engine.llm.loading import locate_checkpoint
    from fledge.train.distributed import join
    from fledge.train.run import run

    start = None if options.start is None else locate_checkpoint(options.start)
    with join(options.parallel, options.device) as team, _reports(chosen, options, team.is_main) as report:
        result = run(chosen, options.data, options.to, report, start=start, team=team, device=options.device)
    if team.is_main:
        _draw(options.to)
        print(escape_controls(str(result)))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set takes NAME=VALUE, not {text!r}")
    return name.strip(), value.strip()


@contextlib.contextmanager
def _reports(recipe: Recipe, options: TrainOptions, leads: bool) -> Iterator[Callable[[Line], None]]:
    """What is to be told of every line: a view on a terminal, plain lines elsewhere, and TensorBoard if asked for."""
    with contextlib.ExitStack() as stack:
        if not leads:
            yield lambda line: None
            return
        sinks: list[Callable[[Line], None]] = []
        if message_console().is_terminal:
            from fledge.cli.views.training import TrainView

            sinks.append(stack.enter_context(TrainView(recipe.steps)))
        else:
            sinks.append(lambda line: print_note(as_text(line)))
        if options.tensorboard:
            sinks.append(_tensorboard(options.to, stack))

        def tell(line: Line) -> None:
            for sink in sinks:
                sink(line)

        yield tell


def _tensorboard(folder: Path, stack: contextlib.ExitStack) -> Callable[[Line], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError('TensorBoard is not installed; `pip install "fledge[train]"` brings it') from None
    writer: Any = SummaryWriter(str(folder / "tensorboard"))
    stack.callback(writer.close)

    def write(line: Line) -> None:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(name, value, int(line["step"]))

    return write


def _draw(folder: Path) -> None:
    """The loss as a picture, where matplotlib is."""
    try:
        from fledge.train.plot import draw
    except ImportError:
        print_note('note: `pip install "fledge[train]"` brings what draws the loss')
        return
    draw(folder / "metrics.jsonl", folder / "loss.png")
