"""The input text of a command: an argument, or the bytes of standard input."""

from __future__ import annotations

import sys

from fledge.core.errors import UsageError


def read_text_or_stdin(argument: str | None, what: str, example: str) -> bytes:
    """The bytes of `argument`, or of standard input if it is None. They need not be valid UTF-8.

    Raises UsageError if both are missing. Python represents invalid UTF-8 in an argument as lone surrogates; this
    function returns the original bytes.
    """
    if argument is not None:
        return argument.encode("utf-8", "surrogateescape")
    if sys.stdin.isatty():
        raise UsageError(f"there is no {what}; give it as an argument, {example}, or pipe it in")
    return sys.stdin.buffer.read()


def strip_final_newline(data: bytes) -> bytes:
    """`data` without one line break at its end, which editors and `echo` add."""
    return data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
