"""The command line of this process, for records of results."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str:
    """Return the command that repeats this run."""
    return shlex.join(["fledge", *sys.argv[1:]])
