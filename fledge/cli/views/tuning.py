"""What `fledge tune` shows: the plan, the examples as the model will see them, progress, and how to use the result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from fledge.cli.terminal import escape_controls, print_heading, print_note, print_rows
from fledge.cli.views.training import as_text
from fledge.data.examples import split_by_loss_mask

if TYPE_CHECKING:
    from fledge.data.examples import Example, Examples
    from fledge.train.tuning.estimate import CostEstimate
    from fledge.train.tuning.run import TuningResult, TuningRun

SHOWN = 3
"""Examples that a dry run prints."""

LINES = 5
"""Numbers of lines that are named before they are only counted."""


def show_plan(run: TuningRun, cost: CostEstimate | None = None) -> None:
    """What will be trained, on what, for how long."""
    print_rows(
        [*_data_rows(run.examples, run.settings.template), *_run_rows(run), *(_cost_rows(run, cost) if cost else [])]
    )


def _data_rows(data: Examples, template: str) -> list[tuple[str, str]]:
    texts = len(data.items) - data.conversations
    lengths = sorted(len(example) for example in data.items)
    rows = [
        ("examples", f"{len(data.items):,} in {data.path}: conversations {data.conversations:,}, texts {texts:,}"),
        *([("template", template)] if data.conversations else []),
        ("tokens", f"{data.tokens:,}, {data.loss_tokens:,} of them to be learnt"),
        ("lengths", f"{lengths[0]:,} to {lengths[-1]:,} tokens, half of them up to {lengths[len(lengths) // 2]:,}"),
    ]
    if data.truncated_lines:
        lost = f"{data.truncated_tokens:,} tokens over --length: {_listed(data.truncated_lines)}"
        rows.append(("cut short", f"{len(data.truncated_lines):,} examples, {lost}"))
    if data.dropped_lines:
        count = f"{len(data.dropped_lines):,} with nothing to learn in that length"
        rows.append(("left out", f"{count}: {_listed(data.dropped_lines)}"))
    if data.joined_lines:
        count = f"taken out of {len(data.joined_lines):,} messages, because they end a turn, here as in a chat"
        rows.append(("blank lines", f"{count}: {_listed(tuple(dict.fromkeys(data.joined_lines)))}"))
    return rows


def _listed(lines: Sequence[int]) -> str:
    more = ", ..." if len(lines) > LINES else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(str(line) for line in lines[:LINES])}{more}"


def _run_rows(run: TuningRun) -> list[tuple[str, str]]:
    settings, trained = run.settings, [weight for weight in run.model.parameters() if weight.requires_grad]
    schedule = settings.schedule(run.steps)
    whole = sum(weight.numel() for weight in run.model.parameters())
    count = sum(weight.numel() for weight in trained)
    return [
        ("trained", f"{count:,} of {whole:,} numbers ({settings.mode})"),
        ("steps", f"{run.steps:,} of {settings.accumulate * settings.batch} examples, {run.epochs:.3g} epochs"),
        ("rate", f"{schedule.max_lr:g} to {schedule.min_lr:g}, after {schedule.warmup_steps} steps of warm-up"),
    ]


def _cost_rows(run: TuningRun, cost: CostEstimate) -> list[tuple[str, str]]:
    return [
        ("padding", f"{run.batches.padding:.0%} of what is read"),
        (
            "memory",
            f"at least {_size(cost.memory)} (on a CPU up to twice that): weights {_size(cost.weights)}, optimizer "
            f"{_size(cost.optimizer)}, the largest batch {_size(cost.batch)}",
        ),
        ("time", f"about {_duration(cost.seconds)} here, from a few batches that were tried"),
    ]


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def show_examples(run: TuningRun) -> None:
    """The first examples, exactly as they are read; what is learnt is colored, or between brackets in a pipe."""
    for example in run.examples.items[:SHOWN]:
        print()
        print_heading(f"line {example.line}, {len(example):,} tokens, {int(example.loss_mask.sum()):,} to be learnt")
        _show_example(example, run)


def _show_example(example: Example, run: TuningRun) -> None:
    runs = split_by_loss_mask(example, run.tokenizer)
    if sys.stdout.isatty():
        marked = Text()
        for text, counts in runs:
            marked.append(escape_controls(text), style="bold green" if counts else "dim")
        Console(highlight=False).print(marked, soft_wrap=True)
    else:
        print("".join(f"⟦{text}⟧" if counts else text for text, counts in runs))


def show_line(line: dict[str, float]) -> None:
    """One line of progress."""
    print(as_text(line), flush=True)


def show_result(done: TuningResult, base: str) -> None:
    """Where the result is and how to use it."""
    print(escape_controls(f"written: {', '.join(str(path) for path in (done.path, *done.others))}"))
    if done.path.name == "model.safetensors":
        print(escape_controls(f"try it:  fledge chat --model {_quoted(done.path)}"))
    else:
        print(escape_controls(f"try it:  fledge chat --model {_quoted(base)} --adapter {_quoted(done.path)}"))
    for path in done.others:
        print_note(f"note: {path} is for the PyPI package rwkv and other RWKV programs")


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))
