"""Options that several commands share, as dataclasses, and the decorator that turns their fields into options.

A command has a parameter `model: ModelOptions`; typer sees `--model`, `--device`, `--dtype` and `--quant`.
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
    """Replace every parameter that is a dataclass by one option for each of its fields."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    # Not get_type_hints: before Python 3.11 it wraps Annotated in Optional if the default is None, and the options
    # inside are lost.
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        group = parameter.annotation
        if dataclasses.is_dataclass(group):
            groups[name] = group
            inner = get_type_hints(group, include_extras=True)
            for annotation in inner.values():
                for option in getattr(annotation, "__metadata__", ()):
                    if "(default: " in (option.help or ""):
                        option.show_default = False  # the help text already states it
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

    attributes: Any = command  # mypy does not allow these attributes on a function
    attributes.__name__, attributes.__doc__ = function.__name__, function.__doc__
    attributes.__signature__ = inspect.Signature(parameters)
    attributes.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@dataclass(frozen=True)
class ModelOptions:
    """The model, and the device and precision it runs with."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="A checkpoint (file or folder) or a hub name. (default: the bundled model)",
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or mps. (default: a GPU if there is one)")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="float32, bfloat16 or float16, for the matrices. (default: depends on the device)"
        ),
    ] = None
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME", help="int8, int4 or mixed: quantize the matrices while loading, on a CPU. (default: no)"
        ),
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Apply a LoRA or a tuned state; may be repeated to combine several."),
    ] = None
    alpha: Annotated[float | None, typer.Option(help="Alpha of a LoRA file that does not record it (.pth).")] = None
    any_base: Annotated[bool, typer.Option("--any-base", help="Use an adapter on a model it was not trained on.")] = (
        False
    )

    def load(self) -> LLM:
        """Load the model, ready to use."""
        with SlowBar("loading the model"):
            from fledge.engine import load

            adapters = read_adapters(self.adapter or (), self.alpha, self.any_base)
            return load(self.model, device=self.device, dtype=self.dtype, quant=self.quant, adapter=adapters)


def parse_integers(name: str, text: str, *, allow_empty: bool = False) -> tuple[int, ...]:
    """The integers of a comma-separated option. allow_empty: ignore empty parts. Raises UsageError for other text."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip() or not allow_empty)
    except ValueError:
        raise UsageError(f"{name} is {text!r:.60}; give whole numbers, separated by commas") from None


def read_adapters(files: Sequence[str], alpha: float | None, any_base: bool) -> list[Adapter]:
    """Read the adapters of a command line. Raises UsageError for an adapter option without an adapter."""
    from fledge import checkpoint

    if not files and (alpha is not None or any_base):
        raise UsageError(
            f"{'--any-base' if alpha is None else '--alpha'} needs an adapter; give one with --adapter FILE"
        )
    adapters = checkpoint.read_adapters(files, alpha=alpha, any_base=any_base)
    if alpha is not None and all(adapter.kind == "state" for adapter in adapters):
        raise UsageError(f"--alpha needs a LoRA, but {adapters[0].path} is a tuned state; remove --alpha")
    return adapters


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters. Options that are not given keep the defaults of the command."""

    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text. (default: random)")] = None
    temperature: Annotated[float | None, typer.Option(help="0 always takes the most probable token. (default: 1)")] = (
        None
    )
    top_p: Annotated[
        float | None, typer.Option(help="Keep the most probable tokens up to this sum. (generate 0.85, chat 0.3)")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Keep at most this many tokens; 0 keeps all. (default: 0)")] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtract from the logit of every used token. (generate 0, chat 0.5)")
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Subtract this for each time a token was used. (generate 0, chat 0.5)")
    ] = None
    penalty_decay: Annotated[
        float | None, typer.Option(help="Factor of past uses for each later token. (default: 0.996)")
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(help="Generate at most this many tokens. (generate 256, chat 1024)")
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stop before this text; may be repeated. In bash $'\\n\\n' is a blank line."),
    ] = None

    def apply_to(self, params: SamplingParams) -> SamplingParams:
        """`params` with the values of the options that were given."""
        overrides = {name: value for name, value in vars(self).items() if value is not None and value != []}
        return params.with_overrides(overrides)
