"""Opening stores: of this software, and pairs of files that other software made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import config, text, write_jsonl
from test_binidx import by_hand

from fledge.core.errors import ConfigError, DataError, UsageError
from fledge.data import store as module
from fledge.data.binidx import writing
from fledge.data.pipeline.build import BuildOptions, build
from fledge.data.store import damaged, open_store, type_for


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
    assert store.has("train") and not store.has("validation") and not store.recorded
    with pytest.raises(UsageError, match="no validation part, only train"):
        list(store.documents())


def test_the_rows_that_a_pair_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary of a pair is not recorded: any number of rows above its ids will do."""
    monkeypatch.setattr(module, "READ", 8)  # the largest id is not in the last block
    pair(tmp_path / "x")
    store = open_store(tmp_path / "x")
    assert store.largest == 70000
    for rows, words in ((0, "vocab_size is 65536"), (512, "vocab_size is 512"), (70000, "vocab_size is 70000")):
        with pytest.raises(ConfigError, match=f"{words}, but the data has ids up to 70000; set it to 70001 or more"):
            store.with_rows(rows)
    larger = store.with_rows(70001)
    assert larger.vocab_size == 70001 and larger.tokenizer_spec is None
    assert larger.tokens("train").tolist() == store.tokens("train").tolist()
    with writing(tmp_path / "y", "<u2") as writer:
        writer.add([300, 1, 0])
    small = open_store(tmp_path / "y")
    assert small.with_rows(301).vocab_size == 301 and small.with_rows(65536).tokenizer_spec == {"kind": "world"}
    assert small.with_rows(0) is small
    with writing(tmp_path / "z", "<i4") as writer:
        writer.add([300, -1])
    with pytest.raises(DataError, match="has the id -1"):
        open_store(tmp_path / "z").with_rows(0)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A store of our own with 300 ids."""
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": text(number), "lang": "en"} for number in range(30)])
    build(config(dedup={"near": False}, vocabulary=300), tmp_path, tmp_path / "store", BuildOptions(workers=1))
    return tmp_path / "store"


def test_the_rows_that_a_store_needs(built: Path) -> None:
    store = open_store(built)
    assert store.with_rows(0) is store.with_rows(300) is store
    with pytest.raises(ConfigError, match="vocab_size is 301, but the vocabulary of the data has 300 ids"):
        store.with_rows(301)
    with pytest.raises(ConfigError, match="vocab_size is 299, but the data has ids up to 299; leave it at 0"):
        store.with_rows(299)


def test_a_part_of_a_store_has_its_vocabulary(built: Path) -> None:
    part = open_store(built / "validation")
    assert part.recorded and part.tokenizer_spec == open_store(built).tokenizer_spec and part.vocab_size == 300
    for name in ("train.bin", "train.idx"):
        (built / name).rename(built / name.replace("train", "mine"))
    assert open_store(built / "mine").vocab_size == 65536  # beside a store, but no part of it


def test_damage_that_keeps_the_size_is_found(built: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert list(damaged(built, lambda done, total: seen.append((done, total)))) == []
    assert seen[0][0] == 0 and seen == sorted(seen) and seen[-1][0] < seen[0][1]
    for name in ("train.bin", "validation.jsonl"):
        data = bytearray((built / name).read_bytes())
        data[20] ^= 1
        (built / name).write_bytes(data)
    open_store(built)
    assert list(damaged(built, lambda *_: None)) == ["train.bin", "validation.jsonl"]


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
    store = build(config(**settings), tmp_path, tmp_path / "store", BuildOptions(workers=1))
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
