"""binidx: the exact layout, reading and open_binidx_writer, and errors for overwrite files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.errors import DataError, FledgeError
from fledge.data.binidx import DTYPES, BinIdx, get_binidx_paths, open_binidx_writer

DOCUMENTS = [[5, 65535, 0], [0], [7, 8, 9, 0]]


def write_documents(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: str = "<u2") -> Path:
    with open_binidx_writer(prefix, dtype) as writer:
        for ids in documents:
            writer.add(ids)
    return prefix


def encode_binidx(code: int, width: str, documents: list[list[int]]) -> tuple[bytes, bytes]:
    """(.bin, .idx) contents, encoded with `struct` as the format specifies. width: the struct code of the ids."""
    ids = b"".join(struct.pack(f"<{len(document)}{width}", *document) for document in documents)
    size = struct.calcsize(f"<{width}")
    starts = [size * sum(map(len, documents[:number])) for number in range(len(documents))]
    count = len(documents)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, count, count + 1)
    index += struct.pack(f"<{count}i", *map(len, documents)) + struct.pack(f"<{count}q", *starts)
    return ids, index + struct.pack(f"<{count + 1}q", *range(count + 1))


@pytest.mark.parametrize(("code", "width", "dtype"), [(8, "H", "<u2"), (4, "i", "<i4")])
def test_the_written_files_match_the_format(tmp_path: Path, code: int, width: str, dtype: str) -> None:
    prefix = write_documents(tmp_path / "x", dtype=dtype)
    assert tuple(path.read_bytes() for path in get_binidx_paths(prefix)) == encode_binidx(code, width, DOCUMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize(
    ("code", "width"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")], ids=DTYPES.values()
)
def test_every_type_of_ids_is_read(tmp_path: Path, code: int, width: str) -> None:
    documents = [[1, 0], [100, 2, 0]]
    for path, data in zip(get_binidx_paths(tmp_path / "x"), encode_binidx(code, width, documents), strict=True):
        path.write_bytes(data)
    store = BinIdx(tmp_path / "x.bin")
    assert [store[number].tolist() for number in range(len(store))] == documents
    assert store.tokens.tolist() == [1, 0, 100, 2, 0] and store.tokens.dtype == DTYPES[code]
    assert store.boundaries.tolist() == [0, 1, 2]


def test_reads_documents_that_are_stored_out_of_order(tmp_path: Path) -> None:
    ids, index = encode_binidx(8, "H", [[1, 2], [3]])
    swapped = bytearray(index)
    swapped[34 + 8 : 34 + 8 + 16] = struct.pack("<qq", 2, 0)
    (tmp_path / "x.bin").write_bytes(ids)
    (tmp_path / "x.idx").write_bytes(swapped)
    store = BinIdx(tmp_path / "x")
    assert store[0].tolist() == [2, 3] and store[1].tolist() == [1]


def test_reads_an_empty_store(tmp_path: Path) -> None:
    store = BinIdx(write_documents(tmp_path / "x", []))
    assert len(store) == 0 and store.tokens.tolist() == []


def test_a_failed_block_leaves_the_old_files(tmp_path: Path) -> None:
    write_documents(tmp_path / "x", [[1]])
    with pytest.raises(RuntimeError), open_binidx_writer(tmp_path / "x", "<u2") as writer:
        writer.add([2, 3])
        raise RuntimeError
    assert BinIdx(tmp_path / "x").tokens.tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("dtype", "ids"), [("<u2", [65536]), ("<u2", [-1]), ("<i4", [1 << 31])])
def test_ids_outside_the_dtype_are_refused(tmp_path: Path, dtype: str, ids: list[int]) -> None:
    with (
        pytest.raises(DataError, match=f"token id {ids[0]} does not fit"),
        open_binidx_writer(tmp_path / "x", dtype) as writer,
    ):
        writer.add(ids)
    with pytest.raises(DataError, match="cannot hold ids of type float32"), open_binidx_writer(tmp_path / "x", "<f4"):
        pytest.fail("a writer of floats was opened")


def overwrite(index: bytes, position: int, change: bytes) -> bytes:
    return index[:position] + change + index[position + len(change) :]


IDS, INDEX = encode_binidx(8, "H", DOCUMENTS)
N = len(DOCUMENTS)


@pytest.mark.parametrize(
    ("ids", "index", "message"),
    [
        (IDS, b"", r"x\.idx: 0 bytes are no binidx index"),
        (IDS, INDEX[:20], r"x\.idx: 20 bytes are no binidx index"),
        (IDS, overwrite(INDEX, 0, b"TNTIDX"), r"x\.idx: not a binidx index"),
        (IDS, overwrite(INDEX, 9, b"\2"), "version 2 is not supported"),
        (IDS, overwrite(INDEX, 17, b"\6"), "dtype code 6 is floating point; ids must be integers"),
        (IDS, overwrite(INDEX, 17, b"\x63"), "dtype code 99 is unknown"),
        (IDS, INDEX[:-1], r"x\.idx: truncated: 3 documents and 4 boundaries need 102 bytes, the file has 101"),
        (IDS, INDEX + b"\0", r"x\.idx: too long"),
        (IDS, overwrite(INDEX, 18, b"\xff" * 8), r"x\.idx: truncated: 18446744073709551615 documents"),
        (IDS, overwrite(INDEX, 34, struct.pack("<i", -1)), r"x\.idx: document 0 has -1 ids"),
        (IDS, overwrite(INDEX, 38, struct.pack("<i", 99)), r"x\.idx: document 1 has 99 ids from byte 6, outside"),
        (IDS, overwrite(INDEX, 34 + 4 * N, struct.pack("<q", -2)), "document 0 has 3 ids from byte -2, outside"),
        (IDS, overwrite(INDEX, 34 + 4 * N, struct.pack("<q", 1)), "document 0 has 3 ids from byte 1, outside"),
        (IDS, overwrite(INDEX, 34 + 4 * N, struct.pack("<q", 2**63 - 1)), "document 0 has 3 ids from byte 9223"),
        (IDS, overwrite(INDEX, 34 + 12 * N, struct.pack("<q", 1)), "boundaries do not increase"),
        (IDS, overwrite(INDEX, 34 + 12 * N + 8, struct.pack("<q", 3)), "boundaries do not increase"),
        (IDS, overwrite(INDEX, 17, b"\4"), r"document 0 has 3 ids from byte 0|document 1 has 1 ids from byte 6"),
        (IDS[:-2], INDEX, r"document 2 has 4 ids from byte 8, outside x\.bin of 14 bytes"),
        (IDS[:-1], INDEX, r"x\.bin: 15 bytes are not a multiple of the size of a uint16"),
        (b"", INDEX, "document 0 has 3 ids"),
        (None, INDEX, r"x\.bin: there is no such file"),
        (IDS, None, r"x\.idx: there is no such file"),
    ],
)
def test_damage_is_named(tmp_path: Path, ids: bytes | None, index: bytes | None, message: str) -> None:
    for path, data in zip(get_binidx_paths(tmp_path / "x"), (ids, index), strict=True):
        if data is not None:
            path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        BinIdx(tmp_path / "x")


@given(
    position=st.integers(0, len(INDEX) - 1),
    junk=st.binary(min_size=1, max_size=9),
    index_size=st.integers(0, len(INDEX)),
    ids_size=st.integers(0, len(IDS)),
)
def test_damaged_files_never_read_outside_the_file(
    tmp_path_factory: pytest.TempPathFactory, position: int, junk: bytes, index_size: int, ids_size: int
) -> None:
    """For any content of the index, opening raises a FledgeError, or all documents are within the file."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "x.bin").write_bytes(IDS[:ids_size])
    changed = overwrite(INDEX, position, junk)
    for index in (changed, INDEX[:index_size], changed[: len(INDEX)]):
        (folder / "x.idx").write_bytes(index)
        try:
            store = BinIdx(folder / "x")
        except FledgeError as error:
            assert "x." in str(error)
            continue
        for number in range(len(store)):
            assert len(store[number]) == store.sizes[number]


def test_many_documents_are_added_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.data.binidx.BLOCK_DOCUMENTS", 3)
    sizes = np.array([2, 1, 3, 1, 1, 2, 4, 1])
    ids = np.arange(sizes.sum(), dtype=np.uint16)
    with open_binidx_writer(tmp_path / "x", "<u2") as writer:
        writer.add_many(ids[:6], sizes[:3])
        writer.add_many(ids[6:], sizes[3:])
        with pytest.raises(DataError, match="add up to 2, but there are 3 ids"):
            writer.add_many(ids[:3], np.array([2]))
    assert (writer.documents, writer.tokens) == (8, 15)
    store = BinIdx(tmp_path / "x")
    assert np.concatenate([store[number] for number in range(8)]).tolist() == ids.tolist()
    assert store.boundaries.tolist() == list(range(9))
