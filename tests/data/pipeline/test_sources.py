"""Reading the inputs of a build: every kind of file and source, slices, and errors for invalid inputs."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from corpora import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.errors import DataError, UsageError
from fledge.data.compression import CompressionError, open_decompressed
from fledge.data.documents import Document, read_jsonl
from fledge.data.pipeline.config import build_config
from fledge.data.pipeline.sources.inputs import find_inputs
from fledge.data.pipeline.sources.reader import read_documents

ROWS = [{"text": f"text {number} é", "lang": "pt-BR", "src": "q"} for number in range(40)]


def read_source(base: Path, source: dict[str, Any], **settings: Any) -> list[Document]:
    """All documents of one source, in the order of its slices."""
    config = build_config({"sources": [source], "piece_bytes": 100, **settings})
    _, slices = find_inputs(config, base)
    assert [part.number for part in slices] == list(range(len(slices)))
    return [document for part in slices for document in read_documents(config, part, None)]


def compress_zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressed: bytes = zstandard.ZstdCompressor().compress(data)
    return compressed


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": compress_zstd,
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_reads_json_lines(tmp_path: Path, suffix: str) -> None:
    plain = write_jsonl(tmp_path / "plain", ROWS).read_bytes()
    half = len(plain) // 2
    # A compressed file may consist of several streams.
    compressed = COMPRESSORS[suffix](plain[:half]) + COMPRESSORS[suffix](plain[half:])
    (tmp_path / f"x.jsonl{suffix}").write_bytes(compressed)
    assert read_source(tmp_path, {"path": f"x.jsonl{suffix}"}) == [Document(row["text"], "pt", "q") for row in ROWS]


@given(size=st.integers(1, 90), lengths=st.lists(st.integers(0, 30), min_size=1), ends_with_newline=st.booleans())
def test_slices_contain_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, size: int, lengths: list[int], ends_with_newline: bool
) -> None:
    folder = tmp_path_factory.mktemp("slices")
    texts = [f"{number}:" + "x" * length for number, length in enumerate(lengths)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "x.jsonl").write_text(lines + "\n" * ends_with_newline)
    assert [document.text for document in read_source(folder, {"path": "x.jsonl"}, piece_bytes=size)] == texts


def test_uses_field_names_and_defaults(tmp_path: Path) -> None:
    rows = [{"q": "why", "a": 5, "l": "de-AT"}, {"q": "so", "a": None, "l": None}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    source = {"path": "x.jsonl", "template": "{q}? {a}", "language_field": "l", "language": "en", "name": "faq"}
    assert read_source(tmp_path, source) == [Document("why? 5", "de", "faq"), Document("so? None", "en", "faq")]
    documents = read_source(tmp_path, {"path": "x.jsonl", "text": "q"})
    assert documents == [Document("why", "", "x"), Document("so", "", "x")]


def test_reads_the_texts_of_a_folder(tmp_path: Path) -> None:
    for name, body in (("b/two.py", "2\n"), ("a.py", "1\n"), ("b/.hidden", "no"), (".git/x", "no"), ("note.md", "m")):
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    (tmp_path / "code" / "three.py.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf3\n"))
    documents = read_source(tmp_path, {"path": "code", "format": "text", "language": "code:python"})
    assert [document.text for document in documents] == ["1\n", "2\n", "m", "3\n"]
    assert {(document.language, document.source) for document in documents} == {("code:python", "code")}
    documents = read_source(tmp_path, {"path": "code/**/*.py"})
    assert [(document.text, document.source) for document in documents] == [("1\n", "code"), ("2\n", "code")]
    assert [document.source for document in read_source(tmp_path, {"path": "code/note.md"})] == ["note"]


def test_reads_parquet_files(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([{**row, "other": 1} for row in ROWS])
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    assert read_source(tmp_path, {"path": "x.parquet"}) == [Document(row["text"], "pt", "q") for row in ROWS]
    assert [document.text for document in read_source(tmp_path, {"path": "x.parquet", "template": "{other}"})] == [
        "1"
    ] * 40
    message = r"x\.parquet has no column 'body' .*set `text` to one of text, lang, src, other"
    with pytest.raises(UsageError, match=message):
        read_source(tmp_path, {"path": "x.parquet", "text": "body"})
    with pytest.raises(UsageError, match=r"row 1: not a document: ValueError"):
        read_source(tmp_path, {"path": "x.parquet", "text": "other"})
    (tmp_path / "y.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match=r"y\.parquet: not a readable Parquet file"):
        read_source(tmp_path, {"path": "y.parquet"})


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"text": 5}', '{"no": 1}', '{"text": "\\ud800"}', '{"text": "a", "lang": 1}']
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_errors_name_the_line_for_any_slice_size(tmp_path: Path, line: str, suffix: str) -> None:
    lines = [json.dumps({"text": "x" * (number % 5)}) for number in range(20)]
    lines[12] = line
    data = "\n".join(lines).encode()
    (tmp_path / f"x.jsonl{suffix}").write_bytes(COMPRESSORS[suffix](data))
    for size in (7, 40, 10_000):
        with pytest.raises(UsageError, match=rf"x\.jsonl{suffix}, line 13: not a JSON object.*on_error"):
            read_source(tmp_path, {"path": f"x.jsonl{suffix}"}, piece_bytes=size)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"source no/\*: there is no such file"):
        read_source(tmp_path, {"path": "no/*"})
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"x\.txt is not a UTF-8 text"):
        read_source(tmp_path, {"path": "x.txt"})
    for suffix in (".xz", ".gz", ".bz2", ".zst"):
        compressed = COMPRESSORS[suffix]("".join(json.dumps(row) for row in ROWS).encode() * 50)
        for name, data in (("short", compressed[: len(compressed) // 2]), ("wrong", b"not compressed at all")):
            path = tmp_path / f"{name}.txt{suffix}"
            path.write_bytes(data)
            with pytest.raises(DataError, match=rf"{name}\.txt{suffix}: cannot be read completely"):
                read_source(tmp_path, {"path": path.name})


def test_errors_explain_why_a_source_has_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("empty", "the folder .*empty contains no files to read"),
        ("em*", r"it matches only folders, such as empty; name the folder itself, or end the pattern with /\*\*/\*"),
        ("absent.jsonl", "there is no such file in .*; paths are relative to the folder of the config file"),
    ):
        with pytest.raises(UsageError, match=message):
            read_source(tmp_path, {"path": path})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["a", "b"]', "an array begins here; each line must be one object"),
        ("[", "an array begins here; each line must be one object"),
        ('"text"', "it is JSON, but not an object"),
        ('{"body": "a"}', "it has no field 'text'"),
    ],
)
def test_lines_that_are_not_an_object_are_explained(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(UsageError, match=rf"x\.jsonl, line 2: not a JSON object with a text: {message}"):
        read_source(tmp_path, {"path": "x.jsonl"})
    with pytest.raises(UsageError, match=r"absent\.jsonl: cannot be read: No such file"):
        list(read_jsonl(tmp_path / "absent.jsonl"))


def test_decompression_uses_bounded_memory(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor().compressobj()
    zeros = bytes(1 << 20)
    compressed = b"".join(compressor.compress(zeros) for _ in range(192)) + compressor.flush()
    assert len(compressed) < 20_000
    (tmp_path / "x.zst").write_bytes(compressed)
    tracemalloc.start()
    try:
        with open_decompressed(tmp_path / "x.zst") as file:
            assert sum(len(block) for block in iter(lambda: file.read(1 << 18), b"")) == 192 << 20
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()


def test_errors_of_the_caller_are_not_converted(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    with pytest.raises(ValueError, match="mine"), open_decompressed(tmp_path / "x"):
        raise ValueError("mine")
    with pytest.raises(CompressionError), open_decompressed(tmp_path / "absent"):
        pytest.fail("an absent file was opened")


@pytest.mark.parametrize(("package", "name"), [("zstandard", "x.jsonl.zst"), ("pyarrow", "x.parquet")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf'{package}; pip install "fledge\[data\]"'):
        read_source(tmp_path, {"path": name})


class FakeStream:
    """A streamed data set with the part of the interface of `datasets` that the code uses."""

    num_shards = 3

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def shard(self, num_shards: int, index: int) -> FakeStream:
        return FakeStream(self._rows[index::num_shards])

    def __iter__(self) -> Iterator[Any]:
        for row in self._rows:
            if isinstance(row, Exception):
                raise row
            yield row


def install_fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_streams_hub_data_sets_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*arguments: Any, **options: Any) -> FakeStream:
        calls.append((arguments, options))
        return FakeStream([{"body": str(number)} for number in range(7)])

    install_fake_datasets(monkeypatch, load)
    source = {"hub": "some/data", "subset": "de", "text": "body", "language": "de", "revision": "abc"}
    assert [document.text for document in read_source(tmp_path, source)] == ["0", "3", "6", "1", "4", "2", "5"]
    assert calls[0] == (("some/data", "de"), {"split": "train", "revision": "abc", "streaming": True})


def test_hub_errors_name_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route\nto host")

    install_fake_datasets(monkeypatch, offline)
    with pytest.raises(
        DataError, match="some/data cannot be read from the hub: ConnectionError: no route to host; check"
    ):
        read_source(tmp_path, {"hub": "some/data"})
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c"}, OSError("gone")]
    install_fake_datasets(monkeypatch, lambda *_, **__: FakeStream(rows))
    with pytest.raises(DataError, match="OSError: gone"):
        read_source(tmp_path, {"hub": "some/data"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="hub data sets need the package datasets"):
        read_source(tmp_path, {"hub": "some/data"})
