"""metrics.jsonl: the measurements of a run, one JSON object per line. Each step has its lines once and in order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fledge.core.files import add_path_to_errors, atomic_path

Line = dict[str, float]
Report = Callable[[Line], None]


class MetricsLogger:
    """Collects losses between two lines and writes the lines. Also passes every line to `report`.

    After a kill, the file may contain lines later than the last checkpoint, the last of them incomplete. `rewind`
    removes them and restores the pending losses from the checkpoint, so the final file equals that of an uninterrupted
    run. `last_step` is the last step whose lines are all written.
    """

    def __init__(self, path: Path, report: Report, *, writes: bool = True) -> None:
        self.path, self.report, self.writes = path, report, writes
        self.losses: list[float] = []
        self.update: dict[str, float] = {}
        self.last_step = 0
        self.tokens = 0
        self.since = time.perf_counter()

    def rewind(self, step: int, pending: dict[str, Any]) -> None:
        """Return to the time after `step` steps. pending: the value of `pending()` at that time."""
        self.losses, self.update = list(pending.get("losses", ())), dict(pending.get("update", {}))
        self.last_step = int(pending.get("told", step))
        if self.writes and self.path.exists():
            lines = [line for line in read_lines(self.path) if line["step"] <= self.last_step]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def pending(self) -> dict[str, Any]:
        """The values for the next lines, for a checkpoint. Checkpoints call `last_step` "told"."""
        return {"losses": self.losses, "update": self.update, "told": self.last_step}

    def add(self, loss: float, tokens: int, **update: float) -> None:
        """Add the loss of one step and its number of tokens. update: more values of the step, such as its norm."""
        self.losses.append(loss)
        self.update = update
        self.tokens += tokens

    def write(self, step: int, **values: float) -> None:
        """Write one line: the step, the mean loss and speed of the steps since the last line, and `values`.

        Without such steps and without values, it writes nothing.
        """
        if not self.losses and not values:
            return
        line: Line = {"step": step}
        if self.losses:
            line["loss"] = sum(self.losses) / len(self.losses)
            line["tokens_per_s"] = self.tokens / (time.perf_counter() - self.since)
        line = {name: float(f"{value:.9g}") for name, value in (line | values).items()}
        line["step"] = step
        if self.writes:
            with add_path_to_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.report(line)
        self.losses, self.tokens, self.since = [], 0, time.perf_counter()


def read_lines(path: Path) -> list[Line]:
    """The lines of a metrics file, up to the first incomplete one."""
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        lines.append(line)
    return lines
