"""What a measuring command does around its measurement: a bar meanwhile, a record that grows, a picture at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fledge.cli.terminal import SlowBar


class Recorded(Protocol):
    """What was measured so far."""

    def record(self, command: str) -> dict[str, Any]:
        """As JSON."""


O = TypeVar("O", bound=Recorded)  # noqa: E741 - an outcome
Step = Callable[[str, int, int], None]
Run = Callable[[Any, Step, Callable[[Any], None]], O]
Draw = Callable[[Mapping[str, Any], Path], None]


def command_line() -> str:
    """How this process was called, to be repeated."""
    return shlex.join(["fledge", *sys.argv[1:]])


def keep(outcome: Recorded, record: Path | None) -> None:
    """Write the record, where one is asked for."""
    if record is not None:
        from fledge.core.files import write_json

        write_json(record, outcome.record(command_line()))


def measured(
    load: Callable[[], tuple[Run[O], Draw]], spec: Callable[[], Any], record: Path | None, plot: Path | None
) -> O:
    """Run a benchmark. Its record is kept whenever a part of it is done; the plot is drawn last, but checked first.

    load, spec: called while the bar is there, because what they import takes seconds.
    """
    with SlowBar("preparing", per_second=1) as bar:
        from fledge.bench.plots import check_drawable

        run, draw = load()
        if plot is not None:
            check_drawable(plot)
        outcome = run(spec(), bar.step, lambda found: keep(found, record))
    if plot is not None:
        draw(outcome.record(command_line()), plot)
    return outcome
