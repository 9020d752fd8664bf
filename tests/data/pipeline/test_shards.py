"""Shards, and the cutting of long documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import make_text
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.pipeline import shards as module
from fledge.data.pipeline.shards import Shard, ShardWriter, parts_of


@given(st.text(alphabet="ab \n", max_size=60), st.integers(4, 20))
def test_parts_are_the_text_and_short_enough(body: str, limit: int) -> None:
    parts = parts_of(body, limit)
    assert "".join(parts) == body
    assert all(0 < len(part) <= limit for part in parts) or parts == [""]
    assert parts_of(body, 0) == [body]


def test_parts_end_with_a_line_or_a_word() -> None:
    assert parts_of("aaaa bbbb\ncccc", 11) == ["aaaa bbbb\n", "cccc"]
    assert parts_of("aaaa bbbb cccc", 11) == ["aaaa bbbb ", "cccc"]
    assert parts_of("a" * 9, 4) == ["aaaa", "aaaa", "a"]


def test_shards_give_back_what_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 900)
    texts = [make_text(number, 30) + "é" for number in range(12)]
    with ShardWriter(tmp_path, None, cut=100) as writer:
        for number, one in enumerate(texts):
            writer.add(one, ("en", "de")[number % 2], "s")
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 2
    found: list[tuple[str, str]] = []
    for number, folder in enumerate(folders):
        shard = Shard(folder, number)
        data = (folder / "text.bin").read_bytes()
        for at, document in enumerate(shard.documents):
            mine = [part for part in shard.parts if part["document"] == at]
            assert [part["part"] for part in mine] == list(range(len(mine)))
            pieces = [data[part["start"] : part["start"] + part["size"]] for part in mine]
            assert sum(map(len, pieces)) == document["bytes"] and len(pieces) > 1
            found.append((b"".join(pieces).decode(), shard.kinds[document["kind"]][0]))
    assert found == [(one, ("en", "de")[number % 2]) for number, one in enumerate(texts)]


def test_nothing_in_nothing_out(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, None, cut=0):
        pass
    assert list(tmp_path.iterdir()) == []
