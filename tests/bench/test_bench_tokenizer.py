"""`fledge bench tokenizer`: its texts, different ids, and what it prints and records."""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fledge.bench import tokenizer as benchmark
from fledge.bench.sample_texts import count_bytes, sample_documents, synthetic_documents
from fledge.bench.suite import run_benchmark
from fledge.bench.tokenizer import TokenizerBenchmark, TokenizerProgram
from fledge.cli.bench.tokenizer import tokenizer as command
from fledge.core.errors import FledgeError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text in three kinds of file, and two files without text."""
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "", "two é"))
    with lzma.open(folder / "a.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (folder / "b.jsonl").write_text(lines, encoding="utf-8")
    (folder / "inner" / "c.txt").write_text("three\n" * 400, encoding="utf-8")
    (folder / "d.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "e.txt").write_text("", encoding="utf-8")
    return folder


def test_a_sample_is_even_and_within_the_limit() -> None:
    texts = [f"{number:04}" for number in range(1000)]
    kept = sample_documents(texts, 1000)
    assert 500 < count_bytes(kept) <= 1000
    steps = {int(after) - int(before) for before, after in pairwise(kept)}
    assert len(steps) == 1
    assert sample_documents(texts, 10**6) == texts and sample_documents(["é" * 100], 11) == ["é" * 5]


def test_synthetic_text() -> None:
    texts = synthetic_documents(60_000)
    assert texts == synthetic_documents(60_000) and 60_000 <= count_bytes(texts) < 80_000
    assert len(set("".join(texts))) > 500


@pytest.mark.parametrize(("field", "value"), [("megabytes", 0.0), ("repeats", 0), ("threads", 0)])
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{field} is {value}"):
        TokenizerBenchmark(**{field: value})


def fast_programs() -> bool:
    """Whether a program that is not written in Python is available."""
    return not all(program.slow for program in benchmark.find_programs(1))


def test_every_program_has_metrics() -> None:
    record = run_benchmark(TokenizerBenchmark(megabytes=0.05, repeats=2, threads=2))
    rates = {name: metrics["bytes_per_s"]["values"] for name, metrics in record["figures"].items()}
    # If all programs are slow, all of them encode the part of the text for slow programs.
    assert "fledge python" in rates and record["text"]["tokens"] > (5000 if fast_programs() else 5000 // 16)
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())


def test_different_ids_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(texts: Sequence[str]) -> list[list[int]]:
        return [[len(text)] for text in texts]

    programs = [
        TokenizerProgram("right", lengths),
        TokenizerProgram("wrong", lambda texts: [*lengths(texts)[:-1], [0]]),
    ]
    monkeypatch.setattr(benchmark, "find_programs", lambda _threads: iter(programs))
    with pytest.raises(FledgeError, match="wrong and right encode document"):
        run_benchmark(TokenizerBenchmark(megabytes=0.05))
    monkeypatch.setattr(benchmark, "find_programs", lambda _threads: iter(programs[:1]))
    assert run_benchmark(TokenizerBenchmark(megabytes=0.05))["ratio_to_the_fastest_peer"] is None


def test_table_json_line_and_record(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fledge", "bench", "tokenizer", "texts"])
    path = tmp_path / "record.json"
    command(text=folder, repeats=1, threads=1, record=path)
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    measured = "texts: 5 documents, 2,418 bytes" if fast_programs() else "texts: 1 documents, "
    assert measured in captured.out and last["megabytes_per_s"]["fledge python"] > 0
    assert "fewer than 3 repeats" in captured.err
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["command"] == "fledge bench tokenizer texts" and record["settings"]["text"] == "texts"
    assert set(record["figures"]) == set(last["megabytes_per_s"]) and record["machine"]["cpu"]
