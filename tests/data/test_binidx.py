"""binidx: the layout byte by byte, both ways, and everything a damaged file can be."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.errors import DataError, FledgeError
from fledge.data.binidx import TYPES, BinIdx, files_of, writing

DOCUMENTS = [[5, 65535, 0], [0], [7, 8, 9, 0]]


def written(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: str = "<u2") -> Path:
    with writing(prefix, dtype) as writer:
        for ids in documents:
            writer.add(ids)
    return prefix


def by_hand(code: int, width: str, documents: list[list[int]]) -> tuple[bytes, bytes]:
    """(.bin, .idx) as the format's description has them, in struct's words."""
    ids = b"".join(struct.pack(f"<{len(one)}{width}", *one) for one in documents)
    size = struct.calcsize(f"<{width}")
    starts = [size * sum(map(len, documents[:at])) for at in range(len(documents))]
    count = len(documents)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, count, count + 1)
    index += struct.pack(f"<{count}i", *map(len, documents)) + struct.pack(f"<{count}q", *starts)
    return ids, index + struct.pack(f"<{count + 1}q", *range(count + 1))


@pytest.mark.parametrize(("code", "width", "dtype"), [(8, "H", "<u2"), (4, "i", "<i4")])
def test_what_is_written_is_the_format(tmp_path: Path, code: int, width: str, dtype: str) -> None:
    prefix = written(tmp_path / "x", dtype=dtype)
    assert tuple(path.read_bytes() for path in files_of(prefix)) == by_hand(code, width, DOCUMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize(
    ("code", "width"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")], ids=TYPES.values()
)
def test_every_type_of_ids_is_read(tmp_path: Path, code: int, width: str) -> None:
    documents = [[1, 0], [100, 2, 0]]
    for path, data in zip(files_of(tmp_path / "x"), by_hand(code, width, documents), strict=True):
        path.write_bytes(data)
    found = BinIdx(tmp_path / "x.bin")
    assert [found[at].tolist() for at in range(len(found))] == documents
    assert found.tokens.tolist() == [1, 0, 100, 2, 0] and found.tokens.dtype == TYPES[code]
    assert found.boundaries.tolist() == [0, 1, 2]


def test_documents_need_not_lie_in_order(tmp_path: Path) -> None:
    ids, index = by_hand(8, "H", [[1, 2], [3]])
    swapped = bytearray(index)
    swapped[34 + 8 : 34 + 8 + 16] = struct.pack("<qq", 2, 0)
    (tmp_path / "x.bin").write_bytes(ids)
    (tmp_path / "x.idx").write_bytes(swapped)
    found = BinIdx(tmp_path / "x")
    assert found[0].tolist() == [2, 3] and found[1].tolist() == [1]


def test_an_empty_store(tmp_path: Path) -> None:
    found = BinIdx(written(tmp_path / "x", []))
    assert len(found) == 0 and found.tokens.tolist() == []


def test_nothing_is_written_by_a_block_that_fails(tmp_path: Path) -> None:
    written(tmp_path / "x", [[1]])
    with pytest.raises(RuntimeError), writing(tmp_path / "x", "<u2") as writer:
        writer.add([2, 3])
        raise RuntimeError
    assert BinIdx(tmp_path / "x").tokens.tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("dtype", "ids"), [("<u2", [65536]), ("<u2", [-1]), ("<i4", [1 << 31])])
def test_ids_that_do_not_fit(tmp_path: Path, dtype: str, ids: list[int]) -> None:
    with pytest.raises(DataError, match=f"token id {ids[0]} does not fit"), writing(tmp_path / "x", dtype) as writer:
        writer.add(ids)
    with pytest.raises(DataError, match="cannot hold ids of type float32"), writing(tmp_path / "x", "<f4"):
        pytest.fail("a writer of floats was made")


def damaged(index: bytes, at: int, change: bytes) -> bytes:
    return index[:at] + change + index[at + len(change) :]


IDS, INDEX = by_hand(8, "H", DOCUMENTS)
N = len(DOCUMENTS)


@pytest.mark.parametrize(
    ("ids", "index", "message"),
    [
        (IDS, b"", r"x\.idx: 0 bytes are no binidx index"),
        (IDS, INDEX[:20], r"x\.idx: 20 bytes are no binidx index"),
        (IDS, damaged(INDEX, 0, b"TNTIDX"), r"x\.idx: not a binidx index"),
        (IDS, damaged(INDEX, 9, b"\2"), "version 2 is unknown"),
        (IDS, damaged(INDEX, 17, b"\6"), "dtype code 6 is floating point"),
        (IDS, damaged(INDEX, 17, b"\x63"), "dtype code 99 is unknown"),
        (IDS, INDEX[:-1], r"x\.idx: cut off: 3 documents and 4 boundaries take 102 bytes, it has 101"),
        (IDS, INDEX + b"\0", r"x\.idx: too long"),
        (IDS, damaged(INDEX, 18, b"\xff" * 8), r"x\.idx: cut off: 18446744073709551615 documents"),
        (IDS, damaged(INDEX, 34, struct.pack("<i", -1)), r"x\.idx: document 0 has -1 ids"),
        (IDS, damaged(INDEX, 38, struct.pack("<i", 99)), r"x\.idx: document 1 has 99 ids from byte 6 on"),
        (IDS, damaged(INDEX, 34 + 4 * N, struct.pack("<q", -2)), "document 0 has 3 ids from byte -2 on"),
        (IDS, damaged(INDEX, 34 + 4 * N, struct.pack("<q", 1)), "document 0 has 3 ids from byte 1 on"),
        (IDS, damaged(INDEX, 34 + 4 * N, struct.pack("<q", 2**63 - 1)), "document 0 has 3 ids from byte 9223"),
        (IDS, damaged(INDEX, 34 + 12 * N, struct.pack("<q", 1)), "boundaries do not rise"),
        (IDS, damaged(INDEX, 34 + 12 * N + 8, struct.pack("<q", 3)), "boundaries do not rise"),
        (IDS, damaged(INDEX, 17, b"\4"), r"document 0 has 3 ids from byte 0|document 1 has 1 ids from byte 6"),
        (IDS[:-2], INDEX, r"document 2 has 4 ids from byte 8 on, which do not fit in x\.bin of 14 bytes"),
        (IDS[:-1], INDEX, r"x\.bin: 15 bytes are no whole number of uint16"),
        (b"", INDEX, "document 0 has 3 ids"),
        (None, INDEX, r"x\.bin: there is no such file"),
        (IDS, None, r"x\.idx: there is no such file"),
    ],
)
def test_damage_is_named(tmp_path: Path, ids: bytes | None, index: bytes | None, message: str) -> None:
    for path, data in zip(files_of(tmp_path / "x"), (ids, index), strict=True):
        if data is not None:
            path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        BinIdx(tmp_path / "x")


@given(
    place=st.integers(0, len(INDEX) - 1),
    junk=st.binary(min_size=1, max_size=9),
    cut=st.integers(0, len(INDEX)),
    ids=st.integers(0, len(IDS)),
)
def test_no_damage_leads_outside_the_file(
    tmp_path_factory: pytest.TempPathFactory, place: int, junk: bytes, cut: int, ids: int
) -> None:
    """Whatever is in the index, opening gives an error of ours or documents within the file."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "x.bin").write_bytes(IDS[:ids])
    for index in (damaged(INDEX, place, junk), INDEX[:cut], damaged(INDEX, place, junk)[: len(INDEX)]):
        (folder / "x.idx").write_bytes(index)
        try:
            found = BinIdx(folder / "x")
        except FledgeError as error:
            assert "x." in str(error)
            continue
        for at in range(len(found)):
            assert len(found[at]) == found.sizes[at]


def test_many_documents_at_once_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.data.binidx.BLOCK", 3)
    sizes = np.array([2, 1, 3, 1, 1, 2, 4, 1])
    ids = np.arange(sizes.sum(), dtype=np.uint16)
    with writing(tmp_path / "x", "<u2") as writer:
        writer.add_many(ids[:6], sizes[:3])
        writer.add_many(ids[6:], sizes[3:])
        with pytest.raises(DataError, match="documents of 2 tokens cannot be cut from 3"):
            writer.add_many(ids[:3], np.array([2]))
    assert (writer.documents, writer.tokens) == (8, 15)
    found = BinIdx(tmp_path / "x")
    assert np.concatenate([found[at] for at in range(8)]).tolist() == ids.tolist()
    assert found.boundaries.tolist() == list(range(9))
