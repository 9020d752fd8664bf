"""Names: a class name means one thing, and no text contains a word that the project has replaced by a standard term."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Interfaces that several modules implement under one name by design: the parts of a model file.
SHARED_BY_DESIGN = {"TimeMix", "ChannelMix", "Block"}

# Names of the first versions, each with the term that replaced it.
REPLACED_NAMES = {
    "Desk": "AsyncEngine",
    "Outbox": "EventBuffer",
    "Strand": "Sequence",
    "Purse": "BurstBudget",
    "Tally": "EngineStats",
    "Shelf": "StateStore",
    "Commons": "SharedStateStore",
    "Trunk": "BaseModel",
    "Recycler": "BufferPool",
    "Outcome": "a report or a result class",
}

# Phrases that a reader has to read twice, each with a plain replacement.
BANNED_PHRASES = {
    r"whoever": "name the person or the program",
    r"anew": "again",
    r"of which": "start a new sentence",
    r"so many": "the number, or 'this many'",
    r"(is|are|was|were) told": "receives, is given, gets an error",
    r"tells (it|them|a|the|what|which|how|whether|apart)": "reports, returns, states",
    r"go(es)? on (from|with|to|as|in|after|reading|writing|where)": "continue",
    r"lies? (in|at|on|beside|below|above|between|within|outside|there)": "is in, is at",
    r"where that is": "if",
    r"betimes|whilst|thereof|therein|hitherto|aught|nought": "present-day English",
    r"the peers?'s?": "the baseline",
    r"is (rung|ringing)|rings? (for|where)|bells?": "notify",
    r"(?<!['\"])(quantis|tokenis|initialis|normalis|optimis|serialis|recognis|summaris)\w*": "American spelling",
    r"(behaviou?r)(?<!behavior)\w*|colour\w*|favour\w*|neighbour\w*|centre\w*|licence|catalogue": "American spelling",
}
BANNED = re.compile("|".join(rf"\b(?:{phrase})\b" for phrase in BANNED_PHRASES), re.IGNORECASE)

PROSE_SUFFIXES = {".md", ".py", ".toml", ".cpp", ".h", ".js", ".css", ".html"}
# This file lists the words themselves.
EXEMPT_FILES = {"tests/test_names.py"}


def repository_texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every tracked file that contains prose."""
    listing = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in listing.splitlines():
        path = REPO / name
        if path.suffix in PROSE_SUFFIXES and name not in EXEMPT_FILES and path.is_file():
            yield name, path.read_text(encoding="utf-8")


def find_banned(text: str) -> Iterator[tuple[int, str]]:
    """(line number, phrase) of every banned phrase in a text."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in BANNED.finditer(line):
            yield number, match.group()


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="needs a git checkout")
def test_no_text_contains_a_banned_phrase() -> None:
    problems = [f"{name}:{line}: {phrase}" for name, text in repository_texts() for line, phrase in find_banned(text)]
    assert problems == []


def test_banned_phrases_are_found_and_plain_text_is_not() -> None:
    assert [
        phrase for _, phrase in find_banned("It goes on from a state,\nwhich lies in a file of which nobody is told.")
    ] == [
        "goes on from",
        "lies in",
        "of which",
        "is told",
    ]
    assert list(find_banned("It continues from a state in a file. Quantize it; the behavior is stable.")) == []


def class_locations() -> dict[str, list[str]]:
    """Class name -> the modules that define it."""
    locations = defaultdict(list)
    for path in sorted((REPO / "fledge").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                locations[node.name].append(path.relative_to(REPO).as_posix())
    return locations


def test_a_class_name_is_defined_once() -> None:
    repeated = {
        name: places for name, places in class_locations().items() if len(places) > 1 and name not in SHARED_BY_DESIGN
    }
    assert repeated == {}


def test_no_class_has_a_replaced_name() -> None:
    assert {name: new for name, new in REPLACED_NAMES.items() if name in class_locations()} == {}
