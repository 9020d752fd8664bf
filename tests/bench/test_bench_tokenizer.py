"""`fledge bench tokenizer`: where its texts come from, that it refuses wrong ids, and what it prints and records."""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fledge.bench import tokenizer as benchmark
from fledge.bench.texts import size_of, synthetic, thinned
from fledge.bench.tokenizer import Program, Spec, run
from fledge.cli.bench_tokenizer import tokenizer as command
from fledge.core.errors import FledgeError, UsageError


def silent(_label: str, _done: int, _total: int) -> None:
    """A report that goes nowhere."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text in three kinds of file, and two that hold none."""
    place = tmp_path / "texts"
    (place / "inner").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "", "two é"))
    with lzma.open(place / "a.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (place / "b.jsonl").write_text(lines, encoding="utf-8")
    (place / "inner" / "c.txt").write_text("three\n" * 400, encoding="utf-8")
    (place / "d.bin").write_bytes(b"\xff\xfe\x00")
    (place / "e.txt").write_text("", encoding="utf-8")
    return place


def test_thinning_is_even_and_within_the_limit() -> None:
    texts = [f"{number:04}" for number in range(1000)]
    kept = thinned(texts, 1000)
    assert 500 < size_of(kept) <= 1000
    steps = {int(after) - int(before) for before, after in pairwise(kept)}
    assert len(steps) == 1
    assert thinned(texts, 10**6) == texts and thinned(["é" * 100], 11) == ["é" * 5]


def test_made_up_text() -> None:
    texts = synthetic(60_000)
    assert texts == synthetic(60_000) and 60_000 <= size_of(texts) < 80_000
    assert len(set("".join(texts))) > 500


@pytest.mark.parametrize(("field", "value"), [("megabytes", 0.0), ("repeats", 0), ("threads", 0)])
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{field} is {value}"):
        Spec(**{field: value})


def fast_programs() -> bool:
    """Whether any program is here that is not written in Python."""
    return not all(program.slow for program in benchmark.find_programs(1))


def test_every_program_has_its_figures() -> None:
    outcome = run(Spec(megabytes=0.05, repeats=2, threads=2), silent)
    # Where all programs are slow ones, all get the part of the text that slow ones get.
    assert "fledge python" in outcome.figures and outcome.text["tokens"] > (5000 if fast_programs() else 5000 // 16)
    assert all(len(sample.values) == 2 and min(sample.values) > 0 for sample in outcome.figures.values())


def test_different_ids_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(texts: Sequence[str]) -> list[list[int]]:
        return [[len(text)] for text in texts]

    programs = [Program("right", lengths), Program("wrong", lambda texts: [*lengths(texts)[:-1], [0]])]
    monkeypatch.setattr(benchmark, "find_programs", lambda _threads: iter(programs))
    with pytest.raises(FledgeError, match="wrong and right cut document"):
        run(Spec(megabytes=0.05), silent)
    monkeypatch.setattr(benchmark, "find_programs", lambda _threads: iter(programs[:1]))
    assert run(Spec(megabytes=0.05), silent).ratio() is None


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
