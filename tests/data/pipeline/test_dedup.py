"""Exact and near duplicates: which one is kept, the separation of validation documents, and partitions."""

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


def build_store(base: Path, to: str = "store", **settings: Any) -> TokenStore:
    return build(make_config(**settings), base, base / to, BuildOptions(workers=1))


def read_training_texts(store: TokenStore) -> list[str]:
    """The training texts of a store with the World vocabulary."""
    index = store.index("train")
    return [load_world().decode(index[number]) for number in range(len(index))]


NO_VALIDATION = {"share": 0.0}


def test_the_first_duplicate_is_kept(tmp_path: Path) -> None:
    rows = [{"text": make_text(number)} for number in (1, 2)]
    duplicate = {"text": make_text(1).upper() + "\n"}
    near = make_near_duplicate(make_text(2, 200), 1)
    write_jsonl(tmp_path / "corpus1.jsonl", rows)
    write_jsonl(tmp_path / "corpus2.jsonl", [duplicate, {"text": near}, {"text": make_text(2, 200)}])
    settings: dict[str, Any] = {"validation": NO_VALIDATION, "languages": {"identify": False}}
    assert read_training_texts(build_store(tmp_path, **settings)) == [make_text(1), make_text(2), near]
    everything = build_store(tmp_path, "all", dedup={"exact": False, "near": False}, **settings)
    assert len(read_training_texts(everything)) == 5
    exact_only = build_store(tmp_path, "exact", dedup={"near": False}, **settings)
    assert len(read_training_texts(exact_only)) == 4


def test_a_document_is_dropped_only_if_it_resembles_a_kept_one_itself(tmp_path: Path) -> None:
    """In a chain of three documents, each resembles the next, but the first does not resemble the last."""
    middle = make_text(5, 400)
    before, after = make_near_duplicate(middle, 1, changes=22), make_near_duplicate(middle, 2, changes=22)
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": before}, {"text": after}, {"text": middle}])
    settings = {"validation": NO_VALIDATION, "languages": {"identify": False}, "dedup": {"threshold": 0.6}}
    assert read_training_texts(build_store(tmp_path, **settings)) == [before, after]


def test_dropped_documents_are_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", make_corpus(240))
    totals = read_counts(build_store(tmp_path).manifest).totals()
    assert totals["read"].documents == totals["clean"].documents == 240
    assert totals["copies"].documents == 24
    near = sum(number % 12 == 11 and number % 10 != 9 for number in range(240))
    assert abs(totals["near copies"].documents - near) <= 3
    stages = ("copies", "near copies", "validation", "train")
    assert sum(totals[stage].documents for stage in stages) == 240


def test_no_training_document_resembles_a_validation_document(tmp_path: Path) -> None:
    originals = [make_text(number, 150) for number in range(200)]
    rows = [{"text": make_near_duplicate(original, number)} for number, original in enumerate(originals)]
    rows += [{"text": original} for original in originals]
    rows += [{"text": make_near_duplicate(original, 1000 + number)} for number, original in enumerate(originals)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    store = build_store(tmp_path, validation={"share": 0.2, "bytes": 10**6}, languages={"identify": False})
    trained = read_training_texts(store)
    held_out = list(store.validation_documents())
    # A fifth of all documents are candidates. Of three near duplicates, a candidate is kept before the others.
    assert 60 < len(held_out) < 140 and abs(len(trained) + len(held_out) - 200) <= 4
    leaked = 0
    for document in held_out:
        text = load_world().decode(document.ids)
        words = text.split()
        leaked += any(sum(a == b for a, b in zip(words, other.split(), strict=False)) > 140 for other in trained)
        assert text not in trained
    assert leaked == 0


def test_partitions_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", make_corpus())
    build_store(tmp_path, "one")
    monkeypatch.setattr(duplicates, "PARTITION_RECORDS", 37)
    monkeypatch.setattr(duplicates, "BATCH_PAIRS", 2)
    assert len(duplicates.make_partitions(1000, {})) == 28
    build_store(tmp_path, "many")
    assert read_files(tmp_path / "one") == read_files(tmp_path / "many")


def test_a_language_may_consist_of_candidates_only(tmp_path: Path) -> None:
    """The hash limit of a share of one or more fits in 64 bits."""
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": make_text(number), "lang": "en"} for number in range(2)])
    store = build_store(tmp_path, validation={"share": 0.5, "documents": 3, "bytes": 10**6})
    assert len(store.index("validation")) == len(store.index("train")) == 1
