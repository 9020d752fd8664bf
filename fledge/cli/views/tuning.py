"""The output of `fledge tune`: the plan, the first examples as the model reads them, progress, and the result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from fledge.cli.terminal import escape_controls, print_heading, print_note, print_rows
from fledge.cli.views.training import format_line
from fledge.data.examples import split_by_loss_mask

if TYPE_CHECKING:
    from fledge.data.examples import Example, Examples
    from fledge.train.tuning.estimate import CostEstimate
    from fledge.train.tuning.run import TuningResult, TuningRun

SHOWN_EXAMPLES = 3
"""The number of examples that a dry run prints."""

SHOWN_LINE_NUMBERS = 5
"""A longer list of line numbers is shortened to this length."""


def show_plan(run: TuningRun, cost: CostEstimate | None = None) -> None:
    """Print the data, the trained parameters, the steps, and the cost if given."""
    print_rows(
        [*_data_rows(run.examples, run.settings.template), *_run_rows(run), *(_cost_rows(run, cost) if cost else [])]
    )


def _data_rows(data: Examples, template: str) -> list[tuple[str, str]]:
    texts = len(data.items) - data.conversations
    lengths = sorted(len(example) for example in data.items)
    rows = [
        ("examples", f"{len(data.items):,} in {data.path}: conversations {data.conversations:,}, texts {texts:,}"),
        *([("template", template)] if data.conversations else []),
        ("tokens", f"{data.tokens:,}, {data.loss_tokens:,} of them in the loss"),
        ("lengths", f"{lengths[0]:,} to {lengths[-1]:,} tokens, median {lengths[len(lengths) // 2]:,}"),
    ]
    if data.truncated_lines:
        lost = f"{data.truncated_tokens:,} tokens beyond --length: {_format_lines(data.truncated_lines)}"
        rows.append(("truncated", f"{len(data.truncated_lines):,} examples, {lost}"))
    if data.dropped_lines:
        rows.append(
            ("skipped", f"{len(data.dropped_lines):,} without tokens in the loss: {_format_lines(data.dropped_lines)}")
        )
    if data.joined_lines:
        count = f"removed from {len(data.joined_lines):,} messages, because a blank line ends a turn"
        rows.append(("blank lines", f"{count}: {_format_lines(tuple(dict.fromkeys(data.joined_lines)))}"))
    return rows


def _format_lines(lines: Sequence[int]) -> str:
    more = ", ..." if len(lines) > SHOWN_LINE_NUMBERS else ""
    shown = ", ".join(str(line) for line in lines[:SHOWN_LINE_NUMBERS])
    return f"line{'s' if len(lines) > 1 else ''} {shown}{more}"


def _run_rows(run: TuningRun) -> list[tuple[str, str]]:
    settings, trained = run.settings, [weight for weight in run.model.parameters() if weight.requires_grad]
    schedule = settings.schedule(run.steps)
    total = sum(weight.numel() for weight in run.model.parameters())
    count = sum(weight.numel() for weight in trained)
    return [
        ("trained", f"{count:,} of {total:,} parameters ({settings.mode})"),
        ("steps", f"{run.steps:,} of {settings.accumulate * settings.batch} examples, {run.epochs:.3g} epochs"),
        ("rate", f"{schedule.max_lr:g} to {schedule.min_lr:g}, after {schedule.warmup_steps} steps of warm-up"),
    ]


def _cost_rows(run: TuningRun, cost: CostEstimate) -> list[tuple[str, str]]:
    return [
        ("padding", f"{run.batches.padding:.0%} of all tokens"),
        (
            "memory",
            f"at least {_format_size(cost.memory)} (on a CPU up to twice that): weights {_format_size(cost.weights)}, "
            f"optimizer {_format_size(cost.optimizer)}, the largest batch {_format_size(cost.batch)}",
        ),
        ("time", f"about {_format_duration(cost.seconds)} on this machine, estimated from a few batches"),
    ]


def _format_size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def show_examples(run: TuningRun) -> None:
    """Print the first examples as the model reads them. Text in the loss is green, or in brackets in a pipe."""
    for example in run.examples.items[:SHOWN_EXAMPLES]:
        print()
        print_heading(f"line {example.line}, {len(example):,} tokens, {int(example.loss_mask.sum()):,} in the loss")
        _show_example(example, run)


def _show_example(example: Example, run: TuningRun) -> None:
    parts = split_by_loss_mask(example, run.tokenizer)
    if sys.stdout.isatty():
        marked = Text()
        for text, is_in_loss in parts:
            marked.append(escape_controls(text), style="bold green" if is_in_loss else "dim")
        Console(highlight=False).print(marked, soft_wrap=True)
    else:
        print("".join(f"⟦{text}⟧" if is_in_loss else text for text, is_in_loss in parts))


def show_line(line: dict[str, float]) -> None:
    """Print one line of metrics."""
    print(format_line(line), flush=True)


def show_result(result: TuningResult, base: str) -> None:
    """Print the paths of the result and the command to try it."""
    print(escape_controls(f"written: {', '.join(str(path) for path in (result.path, *result.others))}"))
    if result.path.name == "model.safetensors":
        print(escape_controls(f"try it:  fledge chat --model {_quote(result.path)}"))
    else:
        print(escape_controls(f"try it:  fledge chat --model {_quote(base)} --adapter {_quote(result.path)}"))
    for path in result.others:
        print_note(f"note: {path} is for the PyPI package rwkv and other RWKV programs")


def _quote(path: str | Path) -> str:
    return shlex.quote(str(path))
