"""Synthetic corpora: texts of invented words, with known exact and near duplicates."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fledge.data.pipeline.config import BuildConfig, build_config

SYLLABLES = [
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ha",
    "je",
    "ki",
    "lo",
    "mu",
    "na",
    "pe",
    "ri",
    "so",
    "tu",
    "va",
    "we",
    "xi",
    "yo",
    "zu",
]


def make_words(rng: random.Random, count: int) -> list[str]:
    """`count` invented words."""
    return ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(count)]


def make_text(seed: int, count: int = 60) -> str:
    """A text of `count` words in lines. The same seed gives the same text."""
    rng = random.Random(f"text {seed}")
    words = make_words(rng, count)
    return "\n".join(" ".join(words[start : start + 9]) for start in range(0, count, 9))


def make_near_duplicate(original: str, seed: int, changes: int = 1) -> str:
    """A near duplicate of a text, with `changes` words replaced."""
    rng = random.Random(f"change {seed}")
    words = original.split(" ")
    for position in rng.sample(range(len(words)), changes):
        words[position] = make_words(rng, 1)[0]
    return " ".join(words)


def make_corpus(count: int = 120) -> list[dict[str, str]]:
    """Documents in three languages and two sources.

    Every tenth is an exact duplicate of an earlier one, every twelfth a near duplicate.
    """
    rows: list[dict[str, str]] = []
    for number in range(count):
        language = ("en", "de", "code:python")[number % 3]
        body = make_text(number, 40 + 7 * (number % 11))
        if number % 10 == 9:
            body = rows[number - 6]["text"].upper().replace(" ", "  ")
        elif number % 12 == 11:
            body = make_near_duplicate(rows[number - 6]["text"], number)
        rows.append({"text": body, "lang": language, "src": "ab"[number % 2]})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_config(**settings: Any) -> BuildConfig:
    """A build config that reads corpus*.jsonl in small slices. settings: values as in the TOML file."""
    values: dict[str, Any] = {
        "sources": [{"path": "corpus*.jsonl"}],
        "piece_bytes": 9000,
        "validation": {"share": 0.1, "documents": 0, "bytes": 2000},
        **settings,
    }
    return build_config(values)


def read_files(folder: Path) -> dict[str, bytes]:
    """name -> content of every file in a folder, such as a store."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
