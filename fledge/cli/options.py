"""Options that several commands share, as dataclasses, and the decorator that spreads them over a command line.

A command takes `model: ModelOptions`; typer sees `--model`, `--device`, `--dtype` and `--quant`. Not here: what
options mean, beyond handing them to the room that knows.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fledge.cli.terminal import SlowBar
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.checkpoint import Adapter
    from fledge.engine import LLM, SamplingParams


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """Every parameter that is a dataclass becomes one option for each of its fields."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    # Not get_type_hints: before Python 3.11 it wraps Annotated in Optional where the default is None, and the options
    # inside are lost.
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        group = parameter.annotation
        if dataclasses.is_dataclass(group):
            groups[name] = group
            inner = get_type_hints(group, include_extras=True)
            for annotation in inner.values():
                for option in getattr(annotation, "__metadata__", ()):
                    if "(default: " in (option.help or ""):
                        option.show_default = False  # said once, in words
            parameters += [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                    annotation=inner[field.name],
                )
                for field in dataclasses.fields(group)
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    described: Any = command
    described.__name__, described.__doc__ = function.__name__, function.__doc__
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="A checkpoint (file or folder) or a hub name. (default: the bundled one)",
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or mps. (default: a GPU if there is one)")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="float32, bfloat16 or float16, for the matrices. (default: as suits the device)"
        ),
    ] = None
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME", help="int8, int4 or mixed: round the matrices while loading, on a CPU. (default: no)"
        ),
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A LoRA or a tuned state on top; may be repeated: they work together."),
    ] = None
    alpha: Annotated[float | None, typer.Option(help="Of a LoRA whose file does not record it (.pth).")] = None
    any_base: Annotated[bool, typer.Option("--any-base", help="Use an adapter on a model it was not trained on.")] = (
        False
    )

    def load(self) -> LLM:
        """The model, ready to use."""
        with SlowBar("loading the model"):
            from fledge.engine import load

            adapters = read_adapters(self.adapter or (), self.alpha, self.any_base)
            return load(self.model, device=self.device, dtype=self.dtype, quant=self.quant, adapter=adapters)


def whole_numbers(name: str, text: str, *, gaps: bool = False) -> tuple[int, ...]:
    """Those between the commas of an option. gaps: nothing may stand there. Raises UsageError for anything else."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip() or not gaps)
    except ValueError:
        raise UsageError(f"{name} is {text!r:.60}; give whole numbers, separated by commas") from None


def read_adapters(files: Sequence[str], alpha: float | None, any_base: bool) -> list[Adapter]:
    """The adapters of a command line. Raises UsageError for an option that has no adapter to say something about."""
    from fledge import checkpoint

    if not files and (alpha is not None or any_base):
        raise UsageError(
            f"{'--any-base' if alpha is None else '--alpha'} is about an adapter; give one with --adapter FILE"
        )
    found = checkpoint.read_adapters(files, alpha=alpha, any_base=any_base)
    if alpha is not None and all(adapter.kind == "state" for adapter in found):
        raise UsageError(f"--alpha is about a LoRA, and {found[0].path} is a tuned state; leave it out")
    return found


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. What is not given stays as the command has it."""

    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text. (default: drawn)")] = None
    temperature: Annotated[float | None, typer.Option(help="0 always takes the most probable token. (default: 1)")] = (
        None
    )
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens up to this probability. (generate 0.85, chat 0.3)")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Then keep at most so many; 0 keeps all. (default: 0)")] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Off the score of every token that has come. (generate 0, chat 0.5)")
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Off it again for each time it came. (generate 0, chat 0.5)")
    ] = None
    penalty_decay: Annotated[
        float | None, typer.Option(help="How much of a past time still counts after each token. (default: 0.996)")
    ] = None
    max_tokens: Annotated[int | None, typer.Option(help="End after so many. (generate 256, chat 1024)")] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be repeated. In bash $'\\n\\n' is a blank line."),
    ] = None

    def applied_to(self, params: SamplingParams) -> SamplingParams:
        """`params` with what was given in place of its own."""
        given = {name: value for name, value in vars(self).items() if value is not None and value != []}
        return params.with_overrides(given)
