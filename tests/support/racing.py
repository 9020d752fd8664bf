"""Processes that all begin at the same moment."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def race(code: str, *arguments: str, count: int, **options: Any) -> list[str]:
    """What `count` processes print after they were let go, each running `code`.

    Once it is ready for that, the code prints "ready" and reads a line. options: of Popen.
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
