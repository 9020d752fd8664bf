"""Reading texts: JSON lines, plain and compressed files, folders, and errors for other files."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from fledge.core.errors import UsageError
from fledge.data.texts import read_texts

LINES = '{"text": "ja", "lang": "de"}\n{"text": ""}\n{"text": "oui", "lang": "fr"}\n'


def test_each_json_line_has_a_language(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(LINES.encode()))
    for name in ("a.jsonl", "a.jsonl.xz"):
        assert [(d.text, d.language) for d in read_texts(tmp_path / name)] == [("ja", "de"), ("oui", "fr")]


def test_reads_a_folder_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "b.jsonl").write_text(LINES)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(LINES.encode()))
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "inner" / "d.txt").write_text("three")
    documents = [(document.text, document.source) for document in read_texts(tmp_path)]
    assert documents == [("ja", "a"), ("oui", "a"), ("ja", "b"), ("oui", "b"), ("three", "d")]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="contains no text"):
        list(read_texts(empty))


def test_a_plain_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfna\xc3\xafve\n\n{}\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two\nlines"))
    assert [(d.text, d.language) for d in read_texts(tmp_path / "a.txt")] == [("naïve\n\n{}\n", "")]
    assert [d.text for d in read_texts(tmp_path / "b.txt.gz")] == ["two\nlines"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("gone.txt", None, r"there is no text file .*gone\.txt"),
        ("a.txt", b"", "contains no text"),
        ("a.jsonl", b'{"text": ""}\n', "contains no text"),
        ("a.jsonl", b"[]\n", "line 1: not a JSON object"),
        ("a.txt", b"\xff\xfe", "is not a UTF-8 text"),
        ("a.txt.gz", b"no archive", "cannot be read"),
        ("a.txt.xz", b"no archive", "cannot be read"),
    ],
)
def test_other_files_are_refused(name: str, data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        list(read_texts(tmp_path / name))
