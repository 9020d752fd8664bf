"""`fledge bench embeddings` on three pairs of sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PAIRS = [
    {"lang": "en", "a": "A man plays the guitar.", "b": "A man plays the guitar.", "score": 5},
    {"lang": "en", "a": "A man plays the guitar.", "b": "A man plays a guitar.", "score": 4.5},
    {"lang": "en", "a": "A man plays the guitar.", "b": "Clouds over Lisbon", "score": 0},
]


def test_a_small_run(fledge: Any, tmp_path: Path) -> None:
    file, record = tmp_path / "pairs.jsonl", tmp_path / "record.json"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    result = fledge("bench", "embeddings", str(file), "--record", str(record))
    assert result.code == 0, result.messages
    metrics = json.loads(record.read_text(encoding="utf-8"))["languages"]["en"]
    assert metrics == {"pairs": 3, "model": pytest.approx(1), "words_in_common": pytest.approx(1)}
