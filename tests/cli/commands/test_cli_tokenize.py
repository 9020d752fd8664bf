"""`fledge tokenize`: ids and pieces, both ways, for any bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fledge.tokenizer import load_world


def test_one_line_per_token(fledge: Any) -> None:
    result = fledge("tokenize", "Hello, œuvre\n")
    expected = ["33155  'Hello'", "   45  ','", "47852  ' œuvre'", "   11  '\\n'"]
    assert result.text.splitlines() == expected
    assert result.messages == ""


def test_standard_input_is_exact(fledge: Any) -> None:
    result = fledge("tokenize", stdin=b"\xff\r\n")
    assert [line.split()[1] for line in result.text.splitlines()] == ["b'\\xff'", "'\\r\\n'"]
    assert fledge("tokenize", stdin=b"").text == "" and fledge("tokenize", "").text == ""


def test_count_and_json(fledge: Any) -> None:
    assert fledge("tokenize", "--count", "Hello, world").text == "3\n"
    record = json.loads(fledge("tokenize", "--json", "Hé").text)
    assert record["ids"] == load_world().encode("Hé") and record["pieces"] == ["H", "é"]


def test_decode_gives_the_exact_bytes(fledge: Any) -> None:
    ids = load_world().encode(b"a \xff b\n")
    assert fledge("tokenize", "--decode", *map(str, ids)).output == b"a \xff b\n"
    assert fledge("tokenize", "--decode", stdin=json.dumps(ids).encode()).output == b"a \xff b\n"
    assert json.loads(fledge("tokenize", "--decode", "--json", "33155").text) == {"ids": [33155], "text": "Hello"}
    assert fledge("tokenize", "--decode", stdin=b" \n").output == b""


def test_the_vocabulary_of_a_model(fledge: Any, byte_model: Path, pruned_model: Path) -> None:
    assert fledge("tokenize", "ab", "--model", byte_model).text == " 97  'a'\n 98  'b'\n"
    assert "33155" not in fledge("tokenize", "Hello", "--model", pruned_model).text


def test_nothing_to_read(fledge: Any) -> None:
    fledge("tokenize", stdin=None).check_error(2, "there is no text")
    fledge("tokenize", "--decode", stdin=None).check_error(2, "there is no id")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--decode", "70000"], 1, ["id 70000", "outside the vocabulary"]),
        (["--decode", "1", "two"], 2, ["'two' is not a token id"]),
        (["--decode", "9" * 30], 2, ["is not a token id"]),
        (["--decode", "--count", "1"], 2, ["--count and --decode"]),
        (["Hello", "world"], 2, ["2 texts", "quotes"]),
    ],
)
def test_mistakes(fledge: Any, arguments: list[str], code: int, words: list[str]) -> None:
    fledge("tokenize", *arguments).check_error(code, *words)
