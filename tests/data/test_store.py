"""Opening token stores: folders of `fledge data build`, and pairs of files of other software."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import make_config, make_text, write_jsonl
from test_binidx import encode_binidx

from fledge.core.errors import ConfigError, DataError, UsageError
from fledge.data import store as store_module
from fledge.data.binidx import open_binidx_writer
from fledge.data.pipeline.build import BuildOptions, build
from fledge.data.store import choose_dtype, find_damaged_files, open_store


def write_pair(prefix: Path) -> None:
    ids, index = encode_binidx(4, "i", [[1, 70000, 0], [5, 0]])
    prefix.with_name(prefix.name + ".bin").write_bytes(ids)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)


@pytest.mark.parametrize("name", ["x", "x.bin", "x.idx"])
def test_opens_a_pair_of_files(tmp_path: Path, name: str) -> None:
    write_pair(tmp_path / "x")
    store = open_store(tmp_path / name)
    assert store.tokens("train").tolist() == [1, 70000, 0, 5, 0]
    assert store.manifest == {} and store.tokenizer_spec == {"kind": "world"} and store.vocab_size == 65536
    assert store.has_part("train") and not store.has_part("validation") and not store.has_vocabulary
    with pytest.raises(UsageError, match="no validation part, only train"):
        list(store.validation_documents())


def test_a_pair_accepts_any_vocab_size_above_its_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "READ_BYTES", 8)  # the largest id is not in the last block
    write_pair(tmp_path / "x")
    store = open_store(tmp_path / "x")
    assert store.max_id == 70000
    for vocab_size, words in ((0, "vocab_size is 65536"), (512, "vocab_size is 512"), (70000, "vocab_size is 70000")):
        with pytest.raises(ConfigError, match=f"{words}, but the data has ids up to 70000; set it to 70001 or more"):
            store.with_vocab_size(vocab_size)
    larger = store.with_vocab_size(70001)
    assert larger.vocab_size == 70001 and larger.tokenizer_spec is None
    assert larger.tokens("train").tolist() == store.tokens("train").tolist()
    with open_binidx_writer(tmp_path / "y", "<u2") as writer:
        writer.add([300, 1, 0])
    small = open_store(tmp_path / "y")
    assert small.with_vocab_size(301).vocab_size == 301 and small.with_vocab_size(65536).tokenizer_spec == {
        "kind": "world"
    }
    assert small.with_vocab_size(0) is small
    with open_binidx_writer(tmp_path / "z", "<i4") as writer:
        writer.add([300, -1])
    with pytest.raises(DataError, match=r"z\.bin contains the id -1; ids cannot be negative"):
        open_store(tmp_path / "z").with_vocab_size(0)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A store of `fledge data build` with a vocabulary of 300 ids."""
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": make_text(number), "lang": "en"} for number in range(30)])
    build(make_config(dedup={"near": False}, vocabulary=300), tmp_path, tmp_path / "store", BuildOptions(workers=1))
    return tmp_path / "store"


def test_a_store_accepts_only_the_size_of_its_vocabulary(built: Path) -> None:
    store = open_store(built)
    assert store.with_vocab_size(0) is store.with_vocab_size(300) is store
    with pytest.raises(ConfigError, match="vocab_size is 301, but the vocabulary of the data has 300 ids"):
        store.with_vocab_size(301)
    with pytest.raises(ConfigError, match="vocab_size is 299, but the data has ids up to 299; leave it at 0"):
        store.with_vocab_size(299)


def test_a_part_of_a_store_uses_the_vocabulary_of_the_store(built: Path) -> None:
    part = open_store(built / "validation")
    assert part.has_vocabulary and part.tokenizer_spec == open_store(built).tokenizer_spec and part.vocab_size == 300
    for name in ("train.bin", "train.idx"):
        (built / name).rename(built / name.replace("train", "mine"))
    assert open_store(built / "mine").vocab_size == 65536  # in the folder of a store, but not part of it


def test_finds_damage_that_keeps_the_file_size(built: Path) -> None:
    reports: list[tuple[int, int]] = []
    assert list(find_damaged_files(built, lambda done, total: reports.append((done, total)))) == []
    assert reports[0][0] == 0 and reports == sorted(reports) and reports[-1][0] < reports[0][1]
    for name in ("train.bin", "validation.jsonl"):
        data = bytearray((built / name).read_bytes())
        data[20] ^= 1
        (built / name).write_bytes(data)
    open_store(built)
    assert list(find_damaged_files(built, lambda *_: None)) == ["train.bin", "validation.jsonl"]


def test_finds_pairs_with_the_file_names_of_json2binidx(tmp_path: Path) -> None:
    write_pair(tmp_path / "x_text_document")
    assert len(open_store(tmp_path / "x").index("train")) == 2


def test_the_content_hash_depends_on_the_ids_only(tmp_path: Path) -> None:
    for name, ids in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])):
        with open_binidx_writer(tmp_path / name, "<u2") as writer:
            writer.add(ids)
    first, second, third = (open_store(tmp_path / name).sha256 for name in "abc")
    assert first == second != third


def test_other_paths_are_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no token store"):
        open_store(tmp_path / "absent")
    with pytest.raises(UsageError, match="contains no finished token store"):
        open_store(tmp_path)


def test_the_dtype_holds_the_vocabulary() -> None:
    assert (
        choose_dtype("auto", 65536) == "<u2"
        and choose_dtype("auto", 65537) == "<i4"
        and choose_dtype("int32", 300) == "<i4"
    )
    with pytest.raises(UsageError, match="uint16 cannot hold a vocabulary of 65537"):
        choose_dtype("uint16", 65537)


def test_validation_records_that_do_not_match_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": make_text(number), "lang": "en"} for number in range(30)])
    settings = {"dedup": {"near": False}, "validation": {"share": 0.3}}
    store = build(make_config(**settings), tmp_path, tmp_path / "store", BuildOptions(workers=1))
    documents = list(store.validation_documents())
    assert len(documents) == len(store.index("validation")) > 2
    assert all(document.source == "corpus" for document in documents)
    path = tmp_path / "store" / "validation.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    # The sizes match the manifest, so opening the store does not detect the change.
    path.write_text(lines[0][:-1] + " " * (sum(map(len, lines[1:])) + 1))
    with pytest.raises(DataError, match=rf"describes 1 documents, but .* has {len(documents)}"):
        list(open_store(tmp_path / "store").validation_documents())
    record = json.dumps({"language": 1})
    path.write_text(record + " " * (sum(map(len, lines)) - len(record)))
    with pytest.raises(DataError, match=r"validation\.jsonl cannot be used"):
        list(open_store(tmp_path / "store").validation_documents())
