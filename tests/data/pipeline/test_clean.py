"""Cleaning steps: the texts that each step changes, drops and keeps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.errors import ConfigError
from fledge.data.pipeline.clean import FILTERS, TRANSFORMATIONS, make_steps
from fledge.data.pipeline.config import DEFAULT_CLEANING


def run_step(setting: Any, text: str) -> str | None:
    (step,) = make_steps([setting])
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
def test_transformations_change_texts_and_are_idempotent(step: str, text: str, expected: str) -> None:
    assert run_step(step, text) == expected
    assert run_step(step, expected) == expected


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
def test_filters_keep_or_drop_texts(step: dict[str, Any], kept: str, dropped: str) -> None:
    assert run_step(step, kept) == kept
    assert run_step(step, dropped) is None


@pytest.mark.parametrize("first", [0x1E900, 0x10330, 0x20000], ids=["Adlam", "Gothic", "ideographs, extension B"])
def test_letters_outside_the_basic_plane_are_distinct_letters(first: int) -> None:
    text = "".join(chr(first + offset) for offset in range(16))
    assert run_step({"min_letters": 1.0}, text) == text
    assert run_step({"max_repeated_characters": 0}, text) == text
    assert run_step({"max_repeated_characters": 0.9}, text[0] * 16) is None


@given(st.text())
def test_steps_accept_any_text_and_are_idempotent(text: str) -> None:
    for name in TRANSFORMATIONS:
        assert isinstance(run_step(name, text), str)
    for name in FILTERS:
        assert run_step({name: 1}, text) in (text, None)
    once = run_default_steps(text)
    assert once is None or run_default_steps(once) == once


def run_default_steps(text: str) -> str | None:
    result: str | None = text
    for step in make_steps(DEFAULT_CLEANING):
        result = None if result is None else step.run(result)
    return result


@pytest.mark.parametrize(
    ("setting", "message"),
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
def test_invalid_steps_are_refused(setting: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_steps([setting])
