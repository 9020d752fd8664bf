"""The terminal view of a training run: progress, a curve of the loss, speed, and the last validation."""

from __future__ import annotations

import time
from itertools import pairwise
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fledge.cli.terminal import message_console

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 60


class TrainView:
    """Receives each line of metrics and redraws itself in place. The last state stays on the screen."""

    def __init__(self, steps: int) -> None:
        self.steps, self.losses, self.latest = steps, list[float](), dict[str, float]()
        self.first: tuple[float, float] | None = None  # step and time of the first line
        self.live = Live(self._render(), console=message_console(), refresh_per_second=2)

    def __enter__(self) -> TrainView:
        self.live.start()
        return self

    def __call__(self, line: dict[str, float]) -> None:
        """Show a new line of metrics."""
        self.first = self.first or (line["step"], time.monotonic())
        if line.keys() == {"step"}:
            self.live.console.print(Text(format_line(line), style="dim"))
        self.latest |= line
        if "loss" in line:
            self.losses.append(line["loss"])
        self.live.update(self._render())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def _render(self) -> Group:
        step = self.latest.get("step", 0.0)
        progress = Table.grid(padding=(0, 2))
        progress.add_row(
            Text(f"step {step:,.0f} of {self.steps:,}"),
            ProgressBar(total=self.steps, completed=step, width=WIDTH // 2),
            Text(self._format_remaining(step)),
        )
        values = [f"{name.replace('_', ' ')} {self.latest[name]:,.4g}" for name in SHOWN if name in self.latest]
        scores = [f"{name[4:]} {value:.3f}" for name, value in self.latest.items() if name.startswith("bpb_")]
        curve = Text(draw_curve(self.losses, WIDTH), style="cyan")
        rows: list[Table | Text] = [progress, curve, Text("  ".join(values))]
        if scores:
            rows.append(Text("bits per byte: " + "  ".join(scores), style="dim"))
        return Group(*rows)

    def _format_remaining(self, step: float) -> str:
        if self.first is None or step <= self.first[0]:
            return ""
        seconds = (time.monotonic() - self.first[1]) / (step - self.first[0]) * (self.steps - step)
        return f"{seconds / 3600:.1f} h left" if seconds > 5400 else f"{seconds / 60:.0f} min left"


SHOWN = ("loss", "norm", "rate", "tokens_per_s")


def format_line(line: dict[str, float]) -> str:
    """A line of metrics as text. A line with only the step is the first one of a continued run."""
    if line.keys() == {"step"}:
        return f"continues from step {line['step']:.0f}"
    return "  ".join(f"{name} {value:.4g}" for name, value in line.items())


def draw_curve(values: list[float], width: int) -> str:
    """Numbers as a line of block characters. Each block shows the mean of an equal part of the numbers."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
