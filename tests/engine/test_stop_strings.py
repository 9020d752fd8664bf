"""Stop texts across every way of cutting the bytes into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.engine.detokenizer import StopMatcher


def run(pieces: list[bytes], stops: tuple[str, ...]) -> tuple[bytes, str | None]:
    """What is shown of `pieces`, and the stop text that was found."""
    matcher, shown = StopMatcher(stops), b""
    for piece in pieces:
        shown += matcher.feed(piece)
        if matcher.matched:
            break
    return shown + matcher.flush(), matcher.matched


def by_hand(text: bytes, stops: tuple[str, ...]) -> tuple[bytes, str | None]:
    """The rule read aloud: go along the text until it ends in a stop text; of several take the longest."""
    for end in range(len(text) + 1):
        there = [stop for stop in stops if text[:end].endswith(stop.encode())]
        if there:
            stop = max(there, key=len)
            return text[: end - len(stop.encode())], stop
    return text, None


@given(
    st.lists(st.sampled_from(["a", "b", "ab", "ba\n", "\n", "é", "\u3002\n"]), max_size=12),
    st.lists(st.sampled_from(["\n\n", "ab", "bab", "aba\n", "\nb", "é\n", "a", "\n\nb:"]), max_size=3),
    st.data(),
)
def test_any_cut_into_pieces_gives_the_same_text(words: list[str], stops: list[str], data: st.DataObject) -> None:
    text = "".join(words).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    wanted = by_hand(text, tuple(stops))
    assert run([text], tuple(stops)) == wanted
    assert run(pieces, tuple(stops)) == wanted
    assert run([bytes([byte]) for byte in text], tuple(stops)) == wanted


def test_what_could_become_a_stop_text_is_held_back_and_nothing_else() -> None:
    matcher = StopMatcher(("\n\nUser:", "END"))
    assert matcher.feed(b"Hi\n") == b"Hi"
    assert matcher.feed(b"\nUs") == b""
    assert matcher.feed(b"ual E") == b"\n\nUsual "
    assert matcher.feed(b"N") == b""
    assert matcher.flush() == b"EN"
    assert matcher.matched is None


@pytest.mark.parametrize("stops", [(), ("zz",)])
def test_without_a_match_everything_comes_out_at_once(stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    assert matcher.feed(b"abc\xff") == b"abc\xff"
    assert matcher.flush() == b""
