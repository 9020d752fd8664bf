"""Opening stores: of this software, and pairs of files that other software made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import config, text, write_jsonl
from test_binidx import by_hand

from fledge.core.errors import DataError, UsageError
from fledge.data.binidx import writing
from fledge.data.build import Options, build
from fledge.data.store import open_store, type_for


def pair(prefix: Path) -> None:
    ids, index = by_hand(4, "i", [[1, 70000, 0], [5, 0]])
    prefix.with_name(prefix.name + ".bin").write_bytes(ids)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)


@pytest.mark.parametrize("name", ["x", "x.bin", "x.idx"])
def test_a_pair_of_files(tmp_path: Path, name: str) -> None:
    pair(tmp_path / "x")
    store = open_store(tmp_path / name)
    assert store.tokens("train").tolist() == [1, 70000, 0, 5, 0]
    assert store.manifest == {} and store.tokenizer_spec == {"kind": "world"} and store.vocab_size == 65536
    assert store.has("train") and not store.has("validation")
    with pytest.raises(UsageError, match="no validation part, only train"):
        list(store.documents())


def test_names_of_other_software(tmp_path: Path) -> None:
    pair(tmp_path / "x_text_document")
    assert len(open_store(tmp_path / "x").index("train")) == 2


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    for name, ids in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])):
        with writing(tmp_path / name, "<u2") as writer:
            writer.add(ids)
    first, second, third = (open_store(tmp_path / name).sha256 for name in "abc")
    assert first == second != third


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no token store"):
        open_store(tmp_path / "absent")
    with pytest.raises(UsageError, match="holds no finished token store"):
        open_store(tmp_path)


def test_types() -> None:
    assert type_for("auto", 65536) == "<u2" and type_for("auto", 65537) == "<i4" and type_for("int32", 300) == "<i4"
    with pytest.raises(UsageError, match="uint16 cannot hold a vocabulary of 65537"):
        type_for("uint16", 65537)


def test_spans_that_do_not_fit(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": text(number), "lang": "en"} for number in range(30)])
    settings = {"dedup": {"near": False}, "validation": {"share": 0.3}}
    store = build(config(**settings), tmp_path, tmp_path / "store", Options(workers=1))
    spans = list(store.documents())
    assert len(spans) == len(store.index("validation")) > 2 and all(span.source == "corpus" for span in spans)
    place = tmp_path / "store" / "validation.jsonl"
    lines = place.read_text().splitlines(keepends=True)
    # The manifest knows sizes only, so a change that keeps the size is found here.
    place.write_text(lines[0][:-1] + " " * (sum(map(len, lines[1:])) + 1))
    with pytest.raises(DataError, match=rf"describes 1 documents, .* has {len(spans)}"):
        list(open_store(tmp_path / "store").documents())
    record = json.dumps({"language": 1})
    place.write_text(record + " " * (sum(map(len, lines)) - len(record)))
    with pytest.raises(DataError, match=r"validation\.jsonl cannot be used"):
        list(open_store(tmp_path / "store").documents())
