"""What a terminal shows while a model is trained: how far it is, the loss as a curve, speed, the last validation."""

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
    """Called with each line of metrics; redraws itself in place until the block ends, and leaves the last picture."""

    def __init__(self, steps: int) -> None:
        self.steps, self.losses, self.latest = steps, list[float](), dict[str, float]()
        self.first: tuple[float, float] | None = None  # step and time of the first line
        self.live = Live(self._draw(), console=message_console(), refresh_per_second=2)

    def __enter__(self) -> TrainView:
        self.live.start()
        return self

    def __call__(self, line: dict[str, float]) -> None:
        """A new line."""
        self.first = self.first or (line["step"], time.monotonic())
        if line.keys() == {"step"}:
            self.live.console.print(Text(as_text(line), style="dim"))
        self.latest |= line
        if "loss" in line:
            self.losses.append(line["loss"])
        self.live.update(self._draw())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def _draw(self) -> Group:
        step = self.latest.get("step", 0.0)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {step:,.0f} of {self.steps:,}"),
            ProgressBar(total=self.steps, completed=step, width=WIDTH // 2),
            Text(self._left(step)),
        )
        facts = [f"{name.replace('_', ' ')} {self.latest[name]:,.4g}" for name in SHOWN if name in self.latest]
        scores = [f"{name[4:]} {value:.3f}" for name, value in self.latest.items() if name.startswith("bpb_")]
        rows: list[Table | Text] = [head, Text(curve(self.losses, WIDTH), style="cyan"), Text("  ".join(facts))]
        if scores:
            rows.append(Text("bits per byte: " + "  ".join(scores), style="dim"))
        return Group(*rows)

    def _left(self, step: float) -> str:
        if self.first is None or step <= self.first[0]:
            return ""
        seconds = (time.monotonic() - self.first[1]) / (step - self.first[0]) * (self.steps - step)
        return f"{seconds / 3600:.1f} h left" if seconds > 5400 else f"{seconds / 60:.0f} min left"


SHOWN = ("loss", "norm", "rate", "tokens_per_s")


def as_text(line: dict[str, float]) -> str:
    """A line of metrics for people; the step alone is where an earlier run stopped."""
    if line.keys() == {"step"}:
        return f"continues from step {line['step']:.0f}"
    return "  ".join(f"{name} {value:.4g}" for name, value in line.items())


def curve(values: list[float], width: int) -> str:
    """Numbers as a line of blocks: all of them, each block the mean of its share."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
