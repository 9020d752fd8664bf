"""Writing and reading shards, and splitting long documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import make_text
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.pipeline import shards as shards_module
from fledge.data.pipeline.shards import Shard, ShardWriter, split_text


@given(st.text(alphabet="ab \n", max_size=60), st.integers(4, 20))
def test_parts_join_to_the_text_and_respect_the_limit(body: str, limit: int) -> None:
    parts = split_text(body, limit)
    assert "".join(parts) == body
    assert all(0 < len(part) <= limit for part in parts) or parts == [""]
    assert split_text(body, 0) == [body]


def test_parts_end_at_a_line_or_a_word() -> None:
    assert split_text("aaaa bbbb\ncccc", 11) == ["aaaa bbbb\n", "cccc"]
    assert split_text("aaaa bbbb cccc", 11) == ["aaaa bbbb ", "cccc"]
    assert split_text("a" * 9, 4) == ["aaaa", "aaaa", "a"]


def test_shards_preserve_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 900)
    texts = [make_text(number, 30) + "é" for number in range(12)]
    with ShardWriter(tmp_path, None, max_part_characters=100) as writer:
        for number, body in enumerate(texts):
            writer.add(body, ("en", "de")[number % 2], "s")
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 2
    documents: list[tuple[str, str]] = []
    for number, folder in enumerate(folders):
        shard = Shard(folder, number)
        data = (folder / "text.bin").read_bytes()
        for index, document in enumerate(shard.documents):
            parts = [part for part in shard.parts if part["document"] == index]
            assert [part["part"] for part in parts] == list(range(len(parts)))
            contents = [data[part["start"] : part["start"] + part["size"]] for part in parts]
            assert sum(map(len, contents)) == document["bytes"] and len(contents) > 1
            documents.append((b"".join(contents).decode(), shard.kinds[document["kind"]][0]))
    assert documents == [(body, ("en", "de")[number % 2]) for number, body in enumerate(texts)]


def test_a_writer_without_documents_leaves_no_files(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, None, max_part_characters=0):
        pass
    assert list(tmp_path.iterdir()) == []
