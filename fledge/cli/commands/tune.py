"""`fledge tune`: fine-tune a checkpoint, and merge or convert adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fledge.cli.options import spread
from fledge.cli.terminal import SlowBar, escape_controls, print_note
from fledge.core.errors import UsageError

if TYPE_CHECKING:
    from fledge.train.tuning.settings import TuneSettings

BaseName = Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint (file or folder), or tiny-finch.")]
Data = Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="JSON lines, each with a text or messages.")]
AdapterFiles = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Adapter files.")]
Alpha = Annotated[float | None, typer.Option(help="Alpha of a LoRA file that does not record it (.pth).")]

app = typer.Typer(name="tune", add_completion=False)


@app.callback()
def tune() -> None:
    """Fine-tune a checkpoint on your own examples: all weights, a LoRA, or only the initial state."""


@dataclass(frozen=True)
class RunOptions:
    """The options of all modes."""

    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the run. An earlier run in it continues.")
    ] = None
    validate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Examples for validation. They are not trained on.")
    ] = None
    template: Annotated[
        str | None,
        typer.Option(help="Chat template: world, instruct or qa. (default: that of BASE, else world)"),
    ] = None
    length: Annotated[int, typer.Option(help="Maximum tokens per example. The rest is cut off.")] = 1024
    batch: Annotated[int, typer.Option(help="Examples per micro-batch.")] = 4
    accumulate: Annotated[int, typer.Option(help="Micro-batches per step.")] = 1
    epochs: Annotated[float, typer.Option(help="Number of passes over all examples.")] = 3.0
    steps: Annotated[int | None, typer.Option(help="Number of steps, instead of --epochs.")] = None
    rate: Annotated[float | None, typer.Option(help="Learning rate. (full 1e-5, lora 2e-4, state 1)")] = None
    final_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate at the end. (full: the same, lora: a tenth, state: a hundredth)"),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the order of examples and of new LoRA factors.")] = 0
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda or mps. (default: a GPU if there is one)")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="float32 or bfloat16, for the matrix products. (default: depends on the device)"
        ),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and the estimates without training.")] = (
        False
    )

    def settings(self, mode: str, **more: Any) -> TuneSettings:
        """The settings for the trainer, with the default template: that of the base is not known yet."""
        from fledge.train.tuning.settings import TuneSettings

        names = ("batch", "accumulate", "length", "epochs", "steps", "rate", "final_rate", "seed")
        return TuneSettings(mode, **{name: getattr(self, name) for name in names}, **more)


@app.command()
@spread
def full(base: BaseName, data: Data, options: RunOptions) -> None:
    """Train all weights."""
    _run(base, data, options, options.settings("full"))


@app.command()
@spread
def lora(
    base: BaseName,
    data: Data,
    options: RunOptions,
    rank: Annotated[int, typer.Option(help="Rank of the factors.")] = 16,
    alpha: Annotated[float, typer.Option(help="Their product is multiplied by alpha / rank.")] = 32.0,
    targets: Annotated[
        str | None,
        typer.Option(help="Matrices with factors, separated by commas: att.key, value and so on. (default: all)"),
    ] = None,
    train_parts: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="Also train all parameters whose name contains one of these: time,ln."),
    ] = None,
) -> None:
    """Train low-rank factors. The weights do not change."""
    from fledge.models.adapters import TARGETS
    from fledge.train.tuning.settings import LoraSettings

    settings = LoraSettings(rank, alpha, _split_words(targets) or TARGETS, _split_words(train_parts))
    _run(base, data, options, options.settings("lora", lora=settings))


@app.command()
@spread
def state(base: BaseName, data: Data, options: RunOptions) -> None:
    """Train only the initial state."""
    _run(base, data, options, options.settings("state"))


def _split_words(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (word.strip() for word in (text or "").split(","))))


def _run(base: str, data: Path, options: RunOptions, settings: TuneSettings) -> None:
    """Train, or show the plan, and print how to use the result."""
    if options.to is None and not options.dry_run:
        raise UsageError("give a folder for the run, --to FOLDER, or --dry-run to see the plan")
    from fledge import checkpoint
    from fledge.cli.views.tuning import show_examples, show_line, show_plan, show_result
    from fledge.engine.llm.loading import locate_checkpoint
    from fledge.train.tuning.run import prepare

    with SlowBar("reading base and examples"):
        base_checkpoint = checkpoint.read(locate_checkpoint(base))
        settings = replace(settings, template=options.template or base_checkpoint.template or settings.template)
        tokenizer = checkpoint.load_tokenizer(
            base_checkpoint.tokenizer_spec, base_checkpoint.config.vocab_size, str(base_checkpoint.path)
        )
        validate, device, dtype = options.validate, options.device, options.dtype
        run = prepare(base_checkpoint, tokenizer, data, settings, validate=validate, device=device, dtype=dtype)
    if options.to is None or options.dry_run:
        with SlowBar("running a few batches"):
            cost = run.estimate()
        show_plan(run, cost)
        show_examples(run)
        return
    show_plan(run)
    show_result(run.start(options.to, show_line), base)


@app.command()
def merge(
    base: BaseName,
    adapters: AdapterFiles,
    to: Annotated[Path, typer.Option(metavar="FILE", help="The .safetensors or .pth to write.")],
    alpha: Alpha = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Use the adapter on a base it was not trained on.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Merge adapters into the weights and write a checkpoint. Its predictions are verified."""
    with SlowBar("merging"):
        from fledge import checkpoint
        from fledge.cli.options import read_adapters
        from fledge.engine.llm.loading import locate_checkpoint

        result = checkpoint.merge_to_file(
            locate_checkpoint(base), read_adapters(adapters, alpha, any_base), to, force=force
        )
    print(escape_controls(f"{result.target}: {result.nbytes:,} bytes"))
    print(
        f"verified: the adapter changes logits by up to {result.effect:.2g} standard deviations; merging added an "
        f"error of {result.difference:.2g}"
    )
    for note in result.notes:
        print_note(f"note: {note}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="ADAPTER", help="A LoRA or tuned state, of Fledge or RWKV-PEFT.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors or .pth to write.")],
    alpha: Alpha = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Record this model as the base of the adapter (.safetensors).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Convert an adapter: .pth for RWKV-PEFT and rwkv, .safetensors with all metadata."""
    from fledge import checkpoint
    from fledge.cli.options import read_adapters
    from fledge.engine.llm.loading import locate_checkpoint

    (adapter,) = read_adapters([source], alpha, any_base=False)
    base_checkpoint = None if base is None else checkpoint.read(locate_checkpoint(base))
    notes = checkpoint.convert_adapter(adapter, target, base=base_checkpoint, force=force)
    print(escape_controls(f"{target}: {adapter.kind}, {target.stat().st_size:,} bytes"))
    for note in notes:
        print_note(f"note: {note}")
