"""`fledge bench quality`: its options, tables, record and JSON line. The metrics: tests/bench."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = [{"text": "A house by the sea.", "lang": "en"}, {"text": "Ein Haus am See.", "lang": "de"}]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "text.jsonl"


def test_tables_json_line_and_record(fledge: Any, byte_model: Path, text: Path, monkeypatch: Any) -> None:
    path = text.with_name("record.json")
    command = ["bench", "quality", "-m", str(byte_model), "--text", str(text), "--formats", "int8,int4", "--sparsity"]
    command += ["--record", str(path)]
    monkeypatch.setattr("sys.argv", ["fledge", *command])
    result = fledge(*command)
    assert result.code == 0 and result.messages == ""
    assert "bytes on text.jsonl: 33 tokens, 33 bytes" in result.text and "pairs of zeros" in result.text
    rows = [line.split() for line in result.text.splitlines()]
    assert [row[0] for row in rows if row[:1] in (["float32"], ["int8"], ["int4"], ["de"], ["en"])] == [
        *("float32", "int8", "int4", "de", "en")
    ]
    last = json.loads(result.text.splitlines()[-1])
    assert list(last) == ["float32", "int8", "int4"] and 0 < last["int8"]["kl"] < last["int4"]["kl"]
    record = json.loads(path.read_text())
    assert record["command"] == shlex.join(["fledge", *command]) and record["machine"]["torch"]
    assert record["formats"]["int4"]["figures"]["de"]["tokens"] == 15 and len(record["sparsity"]) == 2
    assert record["formats"]["int4"]["figures"]["all"]["kl"] == last["int4"]["kl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--formats", "int3"], ["format 'int3' is none of bf16, int8, int4, mixed"]),
        (["--formats", ","], ["is none of"]),
        (["--tokens", "0"], ["tokens is 0"]),
        (["--text", "gone.txt"], ["there is no text file gone.txt"]),
    ],
)
def test_usage_errors(fledge: Any, byte_model: Path, text: Path, arguments: list[str], words: list[str]) -> None:
    fledge("bench", "quality", "-m", byte_model, "--text", text, *arguments).check_error(2, *words)


def test_a_text_is_required(fledge: Any, byte_model: Path) -> None:
    fledge("bench", "quality", "-m", byte_model).check_error(2, "--text", "see fledge bench quality --help")
