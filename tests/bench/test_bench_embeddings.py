"""Embeddings: the rank correlation, and errors in the file of pairs. A run is in tests/cli."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.bench.embeddings import EmbeddingsBenchmark, spearman
from fledge.bench.suite import run_benchmark
from fledge.core.errors import UsageError


def test_rank_correlation_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 900]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)  # ranks 1, 2.5, 2.5, 4
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"a": "x", "score": 1}', "line 1: not a pair with a, b and score: it has no field 'b'"),
        ('{"a": "x", "b": "", "score": 1}', "line 1: .* a text is empty"),
        ('{"a": "x", "b": "y", "score": "much"}', "line 1: .* could not convert"),
        ('{"a": "x", "b": "y", "score": 1}', "fewer than 3 pairs"),
    ],
)
def test_errors_in_the_file(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        run_benchmark(EmbeddingsBenchmark(file))
