"""Processes that all start at the same moment."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def race(code: str, *arguments: str, count: int, **options: Any) -> list[str]:
    """Run `code` in `count` processes and return their output.

    When it is ready, the code prints "ready" and reads a line; all lines are sent together. options: those of Popen.
    """
    command, pipes = [sys.executable, "-c", code, *arguments], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    runners = [subprocess.Popen(command, text=True, **pipes, **options) for _ in range(count)]
    for runner in runners:
        assert runner.stdout is not None and runner.stdout.readline() == "ready\n"
    for runner in runners:
        assert runner.stdin is not None
        runner.stdin.write("go\n")
        runner.stdin.flush()
    return [runner.communicate()[0].strip() for runner in runners]
