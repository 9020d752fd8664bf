"""Streaming text: any split gives the same text, nothing gets stuck, nothing broken comes out."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.errors import TokenizerError
from fledge.tokenizer import StreamDecoder, load_world

WORLD = load_world()

# Valid characters, truncated ones, bytes that are never valid, surrogates and overlong forms written as bytes.
FRAGMENTS = st.one_of(
    st.binary(max_size=4),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4).map(str.encode),
    st.characters(exclude_categories=["Cs"]).map(lambda char: char.encode()[:-1]),
    st.sampled_from([b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80", "\ufffd".encode(), b"\xf0\x9f"]),
)
DATA = st.lists(FRAGMENTS, max_size=10).map(b"".join)


# The least and the greatest second byte of every range UTF-8 allows, and what may follow.
TAILS = [
    b"",
    *(second + rest for second in (b"\x80", b"\x90", b"\xa0", b"\xbf") for rest in (b"", b"\x80", b"\x80\x80")),
]


def can_be_completed(start: bytes) -> bool:
    """Whether some continuation makes `start` one whole character."""
    for tail in TAILS:
        with suppress(UnicodeDecodeError):
            if len((start + tail).decode()) <= 1:
                return True
    return False


@given(data=DATA, cuts=st.lists(st.integers(0, 60), max_size=8))
def test_any_split_gives_the_text_of_one_decode(data: bytes, cuts: list[int]) -> None:
    decoder = StreamDecoder(WORLD)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    text = "".join(decoder.feed_bytes(data[start:end]) for start, end in pairwise(edges))
    assert text + decoder.flush() == data.decode("utf-8", errors="replace")


@given(data=DATA)
def test_byte_by_byte_only_a_possible_character_waits(data: bytes) -> None:
    decoder = StreamDecoder(WORLD)
    out = ""
    for at in range(len(data)):
        out += decoder.feed_bytes(data[at : at + 1])
        assert can_be_completed(decoder.pending)
        # What has come out is what one decode gives for the bytes that do not wait.
        assert out == data[: at + 1 - len(decoder.pending)].decode("utf-8", errors="replace")


@given(ids=st.lists(st.integers(0, 65535), max_size=30), cuts=st.lists(st.integers(0, 30), max_size=4))
def test_ids_in_any_split(ids: list[int], cuts: list[int]) -> None:
    decoder = StreamDecoder(WORLD)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    text = "".join(decoder.feed(ids[start:end]) for start, end in pairwise(edges))
    assert text + decoder.flush() == WORLD.decode(ids)


def test_split_character_is_printed_whole() -> None:
    decoder = StreamDecoder(WORLD)
    assert [decoder.feed_bytes(bytes([byte])) for byte in "é€😀".encode()] == ["", "é", "", "", "€", "", "", "", "😀"]
    assert decoder.pending == b"" and decoder.flush() == ""


def test_end_of_text_and_reserved_ids_do_not_block() -> None:
    decoder = StreamDecoder(WORLD)
    first, second = "é".encode()
    assert [decoder.feed([token_id]) for token_id in (first + 1, 0, 65535, second + 1)] == ["", "", "", "é"]


def test_a_real_replacement_character_passes() -> None:
    decoder = StreamDecoder(WORLD)
    assert [decoder.feed([token_id]) for token_id in (19232, 59, 19232)] == ["\ufffd", ":", "\ufffd"]


@pytest.mark.parametrize("hopeless", [b"\xff", b"\xc0", b"\x80", b"\xed\xa0", b"\xf4\x90", b"\xe4A"])
def test_invalid_bytes_are_emitted_immediately(hopeless: bytes) -> None:
    decoder = StreamDecoder(WORLD)
    assert decoder.feed_bytes(hopeless) == hopeless.decode("utf-8", errors="replace")
    assert decoder.pending == b""


def test_flush_ends_one_stream_and_starts_another() -> None:
    decoder = StreamDecoder(WORLD)
    assert decoder.feed_bytes(b"a\xe4\xbd") == "a" and decoder.pending == b"\xe4\xbd"
    assert decoder.flush() == "\ufffd" and decoder.flush() == ""
    assert decoder.feed_bytes(b"\xa0b") == "\ufffdb"


def test_invalid_id_does_not_change_the_stream() -> None:
    decoder = StreamDecoder(WORLD)
    decoder.feed_bytes(b"\xe4\xbd")
    with pytest.raises(TokenizerError, match="65536"):
        decoder.feed([59, 65536])
    assert decoder.feed_bytes(b"\xa0") == "你"
