"""The header of a safetensors file, parsed with limits and encoded.

8 bytes   N, little-endian
N bytes   JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
the rest  tensor bytes; offsets count from here
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

METADATA = "__metadata__"
LENGTH_BYTES = 8


class HeaderError(ValueError):
    """A file is not safetensors, or its header is damaged. The text says what is wrong, without the file's name."""


class SafetensorsHeader(NamedTuple):
    """The parsed header; the entries are not checked."""

    entries: dict[str, Any]  # tensor name -> its JSON value
    metadata: dict[str, str] | None  # None if the file has no string map
    data_bytes: int  # bytes that follow the header


def read_header(file: BinaryIO, size: int, limit: int) -> SafetensorsHeader:
    """Read the header of a file of `size` bytes. Raises HeaderError if it is damaged or longer than `limit` bytes."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
        raise HeaderError(f"truncated or not a safetensors file: the header claims {length} bytes, the file has {size}")
    if length > limit:
        raise HeaderError(f"the header claims {length} bytes, more than the limit of {limit}; refused")
    try:
        header = json.loads(file.read(length), object_pairs_hook=reject_repeated_names)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"damaged safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError("damaged safetensors header: it is not a JSON object")
    metadata = header.pop(METADATA, None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise HeaderError(f"damaged safetensors header: {METADATA} is not a map of texts")
    return SafetensorsHeader(header, metadata, size - LENGTH_BYTES - length)


def encode_header(entries: Mapping[str, Any], metadata: Mapping[str, str], alignment: int) -> bytes:
    """Encode everything before the tensor bytes, padded with spaces to a multiple of `alignment` bytes."""
    text = json.dumps({METADATA: dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % alignment)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def reject_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, for `object_pairs_hook`. Raises ValueError if a name appears twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name appears twice")
    return values
