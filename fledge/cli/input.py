"""What a command reads: an argument, or standard input as the bytes that are there."""

from __future__ import annotations

import sys

from fledge.core.errors import UsageError


def text_or_stdin(argument: str | None, what: str, example: str) -> bytes:
    """The bytes of `argument`, or without one those of standard input, valid UTF-8 or not.

    Raises UsageError where there is neither. An argument gives the bytes that were typed, which Python keeps as lone
    surrogates where they are not UTF-8.
    """
    if argument is not None:
        return argument.encode("utf-8", "surrogateescape")
    if sys.stdin.isatty():
        raise UsageError(f"there is no {what}; give it as an argument, {example}, or pipe it in")
    return sys.stdin.buffer.read()


def without_final_newline(data: bytes) -> bytes:
    """`data` less one line end, which editors and `echo` put after a text that does not mean to have it."""
    return data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
