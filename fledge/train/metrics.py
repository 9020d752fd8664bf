"""The lines of metrics.jsonl: what a run says of itself, one JSON object a line, each step once and in order."""

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
    """Collects losses between two lines. `report` is given every line as well. `told`: the last step whose lines are
    all written.

    A run that was killed has lines behind its last checkpoint, perhaps half a one: `rewind` drops them, and takes over
    the losses that the checkpoint held, so that the file in the end is that of a run never stopped.
    """

    def __init__(self, path: Path, report: Report, *, writes: bool = True) -> None:
        self.path, self.report, self.writes = path, report, writes
        self.losses: list[float] = []
        self.update: dict[str, float] = {}
        self.told = 0
        self.tokens = 0
        self.since = time.perf_counter()

    def rewind(self, step: int, held: dict[str, Any]) -> None:
        """To behind `step` steps; held: what `pending` gave then."""
        self.losses, self.update = list(held.get("losses", ())), dict(held.get("update", {}))
        self.told = int(held.get("told", step))
        if self.writes and self.path.exists():
            kept = [line for line in read_lines(self.path) if line["step"] <= self.told]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def pending(self) -> dict[str, Any]:
        """What belongs to the next lines, as plain values."""
        return {"losses": self.losses, "update": self.update, "told": self.told}

    def add(self, loss: float, tokens: int, **update: float) -> None:
        """One step's loss, how many tokens it was made of, and what else is to be said of its update."""
        self.losses.append(loss)
        self.update = update
        self.tokens += tokens

    def write(self, step: int, **values: float) -> None:
        """One line: the step, the mean loss and speed since the last line if any steps were made, `values`.

        Nothing is written where there is nothing to say.
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
    """The lines of a metrics file up to the first that is not whole."""
    found: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        found.append(line)
    return found
