"""`fledge tune`: adapt a checkpoint to examples of one's own; merge and convert what came out of it."""

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
Data = Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="JSON lines, a text or messages each.")]
AdapterFiles = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Adapter files.")]
Alpha = Annotated[float | None, typer.Option(help="Of a LoRA whose file does not record it (.pth).")]

app = typer.Typer(name="tune", add_completion=False)


@app.callback()
def tune() -> None:
    """Adapt a checkpoint to examples of your own: all of it, a LoRA, or only the state it starts from."""


@dataclass(frozen=True)
class RunOptions:
    """What all modes share."""

    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The run's folder; a run that is there goes on.")
    ] = None
    validate: Annotated[Path | None, typer.Option(metavar="FILE", help="Examples to measure on, never trained.")] = None
    template: Annotated[
        str | None,
        typer.Option(help="How messages are written: world, instruct or qa. (default: as BASE was tuned, else world)"),
    ] = None
    length: Annotated[int, typer.Option(help="Tokens of an example that are read; the rest is cut.")] = 1024
    batch: Annotated[int, typer.Option(help="Examples at a time.")] = 4
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1
    epochs: Annotated[float, typer.Option(help="Times that every example is read.")] = 3.0
    steps: Annotated[int | None, typer.Option(help="In place of --epochs.")] = None
    rate: Annotated[float | None, typer.Option(help="Learning rate. (full 1e-5, lora 2e-4, state 1)")] = None
    final_rate: Annotated[
        float | None, typer.Option(help="At the end. (full: the same, lora a tenth, state a hundredth)")
    ] = None
    seed: Annotated[int, typer.Option(help="Of the order of examples and the first factors.")] = 0
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or mps. (default: a GPU if any)")] = None
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="float32 or bfloat16, of the matrix products. (default: as suits)"),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do not.")] = False

    def settings(self, mode: str, **more: Any) -> TuneSettings:
        """For the trainer, but for the template, which the base may decide."""
        from fledge.train.tuning.settings import TuneSettings

        names = ("batch", "accumulate", "length", "epochs", "steps", "rate", "final_rate", "seed")
        return TuneSettings(mode, **{name: getattr(self, name) for name in names}, **more)


@app.command()
@spread
def full(base: BaseName, data: Data, options: RunOptions) -> None:
    """Train all weights further."""
    _run(base, data, options, options.settings("full"))


@app.command()
@spread
def lora(
    base: BaseName,
    data: Data,
    options: RunOptions,
    rank: Annotated[int, typer.Option(help="Of the factors.")] = 16,
    alpha: Annotated[float, typer.Option(help="Their product counts alpha / rank times.")] = 32.0,
    targets: Annotated[
        str | None, typer.Option(help="Matrices, with commas: att.key, value and so on. (default: all)")
    ] = None,
    train_parts: Annotated[
        str | None, typer.Option(metavar="WORDS", help="Also train what has these in its name, whole: time,ln.")
    ] = None,
) -> None:
    """Train factors of low rank beside the weights, which stay as they are."""
    from fledge.models.adapters import TARGETS
    from fledge.train.tuning.settings import LoraSettings

    chosen = LoraSettings(rank, alpha, _words(targets) or TARGETS, _words(train_parts))
    _run(base, data, options, options.settings("lora", lora=chosen))


@app.command()
@spread
def state(base: BaseName, data: Data, options: RunOptions) -> None:
    """Train only the state that texts begin from."""
    _run(base, data, options, options.settings("state"))


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (word.strip() for word in (text or "").split(","))))


def _run(base: str, data: Path, options: RunOptions, settings: TuneSettings) -> None:
    """Read, show or train, and say how to use the result."""
    if options.to is None and not options.dry_run:
        raise UsageError("give the folder of the run, --to FOLDER, or --dry-run to see what it would do")
    from fledge import checkpoint
    from fledge.cli.views.tuning import show_examples, show_line, show_plan, show_result
    from fledge.engine.llm.loading import locate_checkpoint
    from fledge.train.tuning.run import prepare

    with SlowBar("reading base and examples"):
        found = checkpoint.read(locate_checkpoint(base))
        settings = replace(settings, template=options.template or found.template or settings.template)
        tokenizer = checkpoint.load_tokenizer(found.tokenizer_spec, found.config.vocab_size, str(found.path))
        validate, device, dtype = options.validate, options.device, options.dtype
        run = prepare(found, tokenizer, data, settings, validate=validate, device=device, dtype=dtype)
    if options.to is None or options.dry_run:
        with SlowBar("trying a few batches"):
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
    """Write a checkpoint with adapters in its weights; kept only if it predicts what base and adapter do."""
    with SlowBar("merging"):
        from fledge import checkpoint
        from fledge.cli.options import read_adapters
        from fledge.engine.llm.loading import locate_checkpoint

        done = checkpoint.merge_to_file(
            locate_checkpoint(base), read_adapters(adapters, alpha, any_base), to, force=force
        )
    print(escape_controls(f"{done.target}: {done.nbytes:,} bytes"))
    print(
        f"verified: the adapter moves logits by up to {done.effect:.2g} of their spread, merging changed that by "
        f"{done.difference:.2g}"
    )
    for sentence in done.notes:
        print_note(f"note: {sentence}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="ADAPTER", help="A LoRA or tuned state, of Fledge or RWKV-PEFT.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors or .pth to write.")],
    alpha: Alpha = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Record this model as the one it was trained on (.safetensors).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Write an adapter in the other form: .pth for RWKV-PEFT and rwkv, .safetensors with everything recorded."""
    from fledge import checkpoint
    from fledge.cli.options import read_adapters
    from fledge.engine.llm.loading import locate_checkpoint

    (adapter,) = read_adapters([source], alpha, any_base=False)
    found = None if base is None else checkpoint.read(locate_checkpoint(base))
    notes = checkpoint.convert_adapter(adapter, target, base=found, force=force)
    print(escape_controls(f"{target}: {adapter.kind}, {target.stat().st_size:,} bytes"))
    for sentence in notes:
        print_note(f"note: {sentence}")
