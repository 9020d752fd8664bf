"""The trail of a generation: the way to each place in its text."""

from __future__ import annotations

import pytest

from fledge.engine.detokenizer import RewindPoint, StateHistory
from fledge.models import ModelConfig, zero_state
from fledge.models.state_slice import StateSlice

STATES = [StateSlice(zero_state(ModelConfig.finch(1, 32, vocab_size=9, head_size=8), 1)) for _ in range(4)]


def trail() -> StateHistory:
    """Tokens 5 (`ab`), 6 (no bytes) and 7 (`cde`), each with the state before it."""
    found = StateHistory(STATES[0])
    for token, data, state in ((5, b"ab", STATES[0]), (6, b"", STATES[1]), (7, b"cde", STATES[2])):
        found.append(token, data, state)
    return found


@pytest.mark.parametrize(
    ("place", "kept", "state", "token", "rest"),
    [
        (0, (), 0, None, b""),
        (1, (), 0, None, b"a"),
        (2, (5, 6), 2, None, b""),
        (4, (5, 6), 2, None, b"cd"),
        (5, (5, 6), 2, 7, b""),
    ],
)
def test_every_place_has_a_way(place: int, kept: tuple[int, ...], state: int, token: int | None, rest: bytes) -> None:
    for settled in range(place + 1):
        way = trail()
        way.commit(settled)
        cut = way.rewind(place)
        assert cut == RewindPoint(kept, cut.state, token, rest) and cut.state.state is STATES[state].state


def test_before_the_first_token_and_after_a_known_end() -> None:
    assert StateHistory(STATES[0]).rewind(0) == RewindPoint((), STATES[0], None, b"")
    ended = trail()
    ended.append_end(STATES[3])
    assert ended.rewind(5) == RewindPoint((5, 6, 7), STATES[3], None, b"")


def test_what_is_settled_is_gone() -> None:
    way = trail()
    way.commit(3)
    with pytest.raises(AssertionError, match="committed"):
        way.rewind(1)


def test_text_that_stays_open_keeps_no_batch_alive() -> None:
    batch = zero_state(ModelConfig.finch(1, 32, vocab_size=9, head_size=8), 3)
    way = StateHistory(StateSlice(batch, 1))
    for token in (5, 6, 7):
        way.append(token, b"ab", StateSlice(batch, 2))
    assert [mark.before.state.batch for mark in way._entries] == [1, 1, 3]
    way.commit(6)
    way.append(8, b"", StateSlice(batch, 0))
    assert [mark.before.state.batch for mark in way._entries] == [3], "nothing is copied where nothing stays open"
