"""Groups of a mixture: matching documents, and notes about patterns and groups that match nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corpora import make_config, make_text, write_jsonl

from fledge.core.errors import UsageError
from fledge.data.pipeline.build import BuildOptions, build
from fledge.data.pipeline.mixture.groups import MAX_NAMES, find_group, list_remarks
from fledge.data.pipeline.report import REPORT

KINDS = [("de", "b"), ("en", "a"), ("en", "b"), ("fr", "b")]


def make_mixture(*groups: dict[str, Any], **more: Any) -> Any:
    return make_config(mixture={"groups": list(groups), **more}).mixture


def test_a_document_belongs_to_the_first_matching_group() -> None:
    mixture = make_mixture({"name": "one", "languages": ["e*"], "sources": ["b"]}, {"name": "two", "languages": ["e?"]})
    assert [find_group(mixture, *kind) for kind in KINDS] == [-1, 1, 0, -1]


@pytest.mark.parametrize(
    ("groups", "sizes", "lines"),
    [
        ([{"name": "all"}], [5], []),
        (
            [{"name": "some", "languages": ["en", "english"]}, {"name": "rest"}],
            [5, 5],
            ["group some of the mixture: no document has the language 'english'; languages: de, en, fr"],
        ),
        (
            [{"name": "some", "sources": ["c"]}, {"name": "rest"}],
            [0, 5],
            ["group some of the mixture: no document has the source 'c'; sources: a, b"],
        ),
        (
            [{"name": "some", "languages": ["fr"], "sources": ["a"]}, {"name": "rest"}],
            [0, 5],
            ["group some of the mixture: no document has one of its languages and one of its sources"],
        ),
        (
            [{"name": "all"}, {"name": "english", "languages": ["en"]}],
            [5, 0],
            ["group english of the mixture: earlier groups match all of its documents"],
        ),
        (
            [{"name": "french", "languages": ["fr"]}, {"name": "rest"}],
            [0, 5],
            ["group french of the mixture: all of its documents are duplicates, are held out for"],
        ),
        (
            [{"name": "english", "languages": ["en"]}],
            [5],
            ["documents without a group of the mixture are not used: language 'de', source 'b', and 1 more such pairs"],
        ),
    ],
)
def test_notes_name_what_matches_nothing(groups: list[dict[str, Any]], sizes: list[int], lines: list[str]) -> None:
    notes = list(list_remarks(make_mixture(*groups), KINDS, sizes))
    assert len(notes) == len(lines) and all(map(str.startswith, notes, lines)), notes


def test_a_note_names_an_unused_cap_and_a_few_sources() -> None:
    kinds = [("", f"s{number}") for number in range(MAX_NAMES + 3)]
    (line,) = list_remarks(make_mixture({"name": "all"}, source_bytes={"books": 10}), kinds, [1])
    assert line.startswith("mixture.source_bytes: no document has the source 'books'; sources: s0, s1, s10, ")
    assert line.endswith(" and 3 more")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Nine documents of one language and source."""
    write_jsonl(
        tmp_path / "corpus.jsonl", [{"text": make_text(number), "lang": "en", "src": "a"} for number in range(9)]
    )
    return tmp_path


def test_a_build_records_the_notes(base: Path) -> None:
    groups = [{"name": "some", "languages": ["en", "welsh"]}]
    settings: dict[str, Any] = {"mixture": {"groups": groups}, "dedup": {"near": False}}
    line, more = build(make_config(**settings), base, base / "store", BuildOptions(workers=1)).manifest["remarks"]
    assert more.startswith("no document is held out for validation: too few")
    assert line == "group some of the mixture: no document has the language 'welsh'; languages: en"
    assert "Note:</strong> group some of the mixture" in (base / "store" / REPORT).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"groups": [{"name": "g", "languages": ["english"]}]},
            "9 are in no group .*; .* no .* 'english'; languages: en",
        ),
        (
            {"groups": [{"name": "g", "epochs": 0}, {"name": "rest", "languages": ["de"]}]},
            "9 are over the limits of the mixture; .* no document has the language 'de'",
        ),
        (
            {"groups": [{"name": "g", "weight": 1}, {"name": "rest", "languages": ["de"], "weight": 2}]},
            "group rest of the mixture has a weight, but no document: no document has the language 'de'; languages: en",
        ),
    ],
)
def test_a_mixture_without_training_documents_is_an_error(base: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(make_config(mixture=settings, dedup={"near": False}), base, base / "store", BuildOptions(workers=1))
    assert not (base / "store" / "manifest.json").exists()


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (3, 0), (4, 1), (9, 2)])
def test_a_small_corpus_keeps_training_documents(tmp_path: Path, count: int, held_out: int) -> None:
    """With the default settings, which ask for three validation documents of each language."""
    rows = [{"text": make_text(number), "lang": language} for number in range(count) for language in ("en", "de")]
    write_jsonl(tmp_path / "corpus.jsonl", [{**row, "text": row["text"] + row["lang"]} for row in rows])
    settings: dict[str, Any] = {"validation": {}, "dedup": {"near": False}}
    store = build(make_config(**settings), tmp_path, tmp_path / "store", BuildOptions(workers=1))
    assert len(store.index("validation")) == 2 * held_out and len(store.index("train")) == 2 * (count - held_out)
    assert len(store.manifest["remarks"]) == (0 if held_out else 1)


def test_every_group_keeps_training_documents(tmp_path: Path) -> None:
    rows = [{"text": make_text(number), "lang": "en", "src": "b" if number else "a"} for number in range(20)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    groups = [{"name": "a", "sources": ["a"], "weight": 1}, {"name": "b", "sources": ["b"], "weight": 1}]
    settings: dict[str, Any] = {"validation": {"share": 0.9}, "mixture": {"groups": groups}, "dedup": {"near": False}}
    store = build(make_config(**settings), tmp_path, tmp_path / "store", BuildOptions(workers=1))
    assert len(store.index("train")) >= 2 and 10 < len(store.index("validation")) < 19
