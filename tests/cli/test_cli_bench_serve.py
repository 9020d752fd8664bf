"""`fledge bench serve`: mistakes in its options. Measuring: tests/bench."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clients", "two"], ["clients is 'two'; give whole numbers"]),
        (["--tokens", "0"], ["tokens is 0; it must be at least 1"]),
        (["--plot", "p.jpg"], ["a plot is a .png"]),
    ],
)
def test_mistakes(fledge: Any, arguments: list[str], words: list[str]) -> None:
    fledge("bench", "serve", *arguments).check_error(2, *words)
