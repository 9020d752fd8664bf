"""Cleaning steps: each on a text that it changes or drops, and on one that it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.errors import ConfigError
from fledge.data.pipeline.clean import FILTERS, TRANSFORMATIONS, steps
from fledge.data.pipeline.config import STANDARD_CLEANING


def run(chosen: Any, text: str) -> str | None:
    (step,) = steps([chosen])
    return step.run(text)


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ("newlines", "a\r\nb\rc\u2028d\x0be\n", "a\nb\nc\nd\ne\n"),
        ("nfc", "cafe\u0301 \u1100\u1161", "café 가"),
        ("control_characters", "a\x00b\ufeffc\x7f\td\x85\n", "abc\td\x85\n"),
        ("edges", "\n\n  a  \nb\t\n\n\n\n\n\nc \n\n", "  a\nb\n\n\nc"),
    ],
)
def test_transformations(step: str, text: str, expected: str) -> None:
    assert run(step, text) == expected
    assert run(step, expected) == expected


@pytest.mark.parametrize(
    ("step", "kept", "dropped"),
    [
        ({"min_characters": 4}, "abcd", "abc"),
        ({"max_characters": 4}, "abcd", "abcde"),
        ({"max_line_characters": 4}, "abcd\nabcd", "abc\nabcde"),
        ({"max_repeated_lines": 0.4}, "one line\none line\nand two others\n", "one line\none line\none line\nend"),
        ({"max_repeated_characters": 0.4}, "    aab  ccd", "aaaab"),
        ({"min_letters": 0.5}, "ab 12 ж漢 \U00020000 कि", "ab 1234 \U0001f600"),
    ],
)
def test_filters(step: dict[str, Any], kept: str, dropped: str) -> None:
    assert run(step, kept) == kept
    assert run(step, dropped) is None


@pytest.mark.parametrize("first", [0x1E900, 0x10330, 0x20000], ids=["Adlam", "Gothic", "ideographs, extension B"])
def test_letters_beyond_the_first_plane(first: int) -> None:
    """They are letters, and different ones."""
    text = "".join(chr(first + at) for at in range(16))
    assert run({"min_letters": 1.0}, text) == text
    assert run({"max_repeated_characters": 0}, text) == text
    assert run({"max_repeated_characters": 0.9}, text[0] * 16) is None


@given(st.text())
def test_steps_are_total_and_settle(text: str) -> None:
    """No text makes a step fail, and what the standard steps gave, they leave as it is."""
    for name in TRANSFORMATIONS:
        assert isinstance(run(name, text), str)
    for name in FILTERS:
        assert run({name: 1}, text) in (text, None)
    once = cleaned(text)
    assert once is None or cleaned(once) == once


def cleaned(text: str) -> str | None:
    found: str | None = text
    for step in steps(STANDARD_CLEANING):
        found = None if found is None else step.run(found)
    return found


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("newline", "cleaning step 'newline' is unknown; steps: newlines,"),
        ("min_letters", "min_letters needs a limit"),
        ({"newlines": 1}, "is unknown"),
        ({"min_letters": 1.5}, "limit of min_letters is 1.5; it must be a share"),
        ({"min_characters": 0.5}, "limit of min_characters is 0.5; it must be a whole number"),
        ({"min_characters": -1}, "is -1"),
        ({"min_letters": "x"}, "is 'x'"),
        ({"min_letters": 0.5, "nfc": 1}, "is unknown"),
    ],
)
def test_what_is_no_step(chosen: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        steps([chosen])
