"""Copies and near copies: which one stays, that validation stays apart, and that partitions change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corpora import make_config, make_corpus, make_near_duplicate, make_text, read_files, write_jsonl

from fledge.data.pipeline.build import BuildOptions, build
from fledge.data.pipeline.dedup import duplicates
from fledge.data.pipeline.store_assembly import read_counts
from fledge.data.store import TokenStore
from fledge.tokenizer import load_world

pytest.importorskip("rensa")


def made(base: Path, to: str = "store", **settings: Any) -> TokenStore:
    return build(make_config(**settings), base, base / to, BuildOptions(workers=1))


def texts(store: TokenStore) -> list[str]:
    """The training texts of a store of World ids."""
    index = store.index("train")
    return [load_world().decode(index[at]) for at in range(len(index))]


ASIDE_NONE = {"share": 0.0}


def test_the_first_copy_stays(tmp_path: Path) -> None:
    rows = [{"text": make_text(number)} for number in (1, 2)]
    copy = {"text": make_text(1).upper() + "\n"}
    write_jsonl(tmp_path / "corpus1.jsonl", rows)
    write_jsonl(
        tmp_path / "corpus2.jsonl",
        [copy, {"text": make_near_duplicate(make_text(2, 200), 1)}, {"text": make_text(2, 200)}],
    )
    found = texts(made(tmp_path, validation=ASIDE_NONE, languages={"identify": False}))
    assert found == [make_text(1), make_text(2), make_near_duplicate(make_text(2, 200), 1)]
    found = texts(
        made(
            tmp_path, "all", validation=ASIDE_NONE, languages={"identify": False}, dedup={"exact": False, "near": False}
        )
    )
    assert len(found) == 5
    found = texts(made(tmp_path, "exact", validation=ASIDE_NONE, languages={"identify": False}, dedup={"near": False}))
    assert len(found) == 4


def test_only_what_it_resembles_itself_drops_a_document(tmp_path: Path) -> None:
    """A chain: each resembles the next, the ends do not resemble each other."""
    middle = make_text(5, 400)
    before, after = make_near_duplicate(middle, 1, changes=22), make_near_duplicate(middle, 2, changes=22)
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": before}, {"text": after}, {"text": middle}])
    settings = {"validation": ASIDE_NONE, "languages": {"identify": False}, "dedup": {"threshold": 0.6}}
    assert texts(made(tmp_path, **settings)) == [before, after]


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", make_corpus(240))
    totals = read_counts(made(tmp_path).manifest).totals()
    assert totals["read"].documents == totals["clean"].documents == 240
    assert totals["copies"].documents == 24
    near = sum(number % 12 == 11 and number % 10 != 9 for number in range(240))
    assert abs(totals["near copies"].documents - near) <= 3
    parts = ("copies", "near copies", "validation", "train")
    assert sum(totals[stage].documents for stage in parts) == 240


def test_nothing_that_is_trained_on_resembles_validation(tmp_path: Path) -> None:
    originals = [make_text(number, 150) for number in range(200)]
    rows = [{"text": make_near_duplicate(one, number)} for number, one in enumerate(originals)]
    rows += [{"text": one} for one in originals]
    rows += [{"text": make_near_duplicate(one, 1000 + number)} for number, one in enumerate(originals)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    store = made(tmp_path, validation={"share": 0.2, "bytes": 10**6}, languages={"identify": False})
    trained = texts(store)
    spans = list(store.documents())
    # A fifth of all candidates; of three near copies that are on different sides, the one aside stays.
    assert 60 < len(spans) < 140 and abs(len(trained) + len(spans) - 200) <= 4
    leaked = 0
    for span in spans:
        held = load_world().decode(span.ids)
        leaked += any(sum(a == b for a, b in zip(held.split(), one.split(), strict=False)) > 140 for one in trained)
        assert held not in trained
    assert leaked == 0


def test_partitions_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", make_corpus())
    made(tmp_path, "one")
    monkeypatch.setattr(duplicates, "RECORDS", 37)
    monkeypatch.setattr(duplicates, "PAIRS", 2)
    assert len(duplicates.partitions(1000, {})) == 28
    made(tmp_path, "many")
    assert read_files(tmp_path / "one") == read_files(tmp_path / "many")


def test_languages_of_which_everything_may_be_aside(tmp_path: Path) -> None:
    """Shares of one and above are limits that 64 bits can hold."""
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": make_text(number), "lang": "en"} for number in range(2)])
    store = made(tmp_path, validation={"share": 0.5, "documents": 3, "bytes": 10**6})
    assert len(store.index("validation")) == len(store.index("train")) == 1
