"""The safetensors header: a round trip, agreement with the safetensors library, and damaged headers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fledge.core.safetensors_header import HeaderError, encode_header, read_header

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def parse(data: bytes, limit: int = 1 << 20) -> tuple[dict[str, object], dict[str, str] | None, int]:
    return read_header(io.BytesIO(data), len(data), limit)


def framed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def test_a_header_is_read_back() -> None:
    data = encode_header({"a": ENTRY}, {"note": "x"}, 64)
    assert len(data) % 64 == 0
    assert parse(data + bytes(4)) == ({"a": ENTRY}, {"note": "x"}, 4)


def test_files_of_the_safetensors_library_are_read() -> None:
    data = save({"a": torch.zeros(1)}, {"note": "x"})
    assert parse(data) == ({"a": ENTRY}, {"note": "x"}, 4)
    assert parse(save({"a": torch.zeros(1)}))[1] is None, "no string map"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated or not a safetensors file"),
        (b"\x01" * 7, "truncated or not a safetensors file"),
        ((9).to_bytes(8, "little") + b"{}", "the header claims 9 bytes, the file has 10"),
        (framed(b" " * 1025), "the header claims 1025 bytes, more than the limit of 1024"),
        (framed(b"{"), "damaged safetensors header"),
        (framed(b"[" * 1000 + b"]" * 20), "damaged safetensors header"),
        (framed(b"[]"), "it is not a JSON object"),
        (framed(b'{"a": 1, "a": 2}'), "a name appears twice"),
        (framed(b'{"__metadata__": {"a": "x", "a": "y"}}'), "a name appears twice"),
        (framed(b'{"__metadata__": {"a": 1}}'), "__metadata__ is not a map of texts"),
        (framed(b'{"__metadata__": []}'), "__metadata__ is not a map of texts"),
    ],
)
def test_damaged_headers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=message):
        parse(data, limit=1024)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(framed(json.dumps({"a": ENTRY}).encode()) + bytes(4))
    with open(path, "rb") as file:
        header = read_header(file, path.stat().st_size, 1024)
        assert file.read() == bytes(4)
    assert header.data_bytes == 4
