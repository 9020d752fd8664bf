"""A text read once: known afterwards, to the bit, whatever cut the reading off, and never mistaken for another."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import ByteTokenizer, equal_states, random_finch

from fledge.core.errors import UsageError
from fledge.core.interrupts import Interrupted
from fledge.engine.generation import PREFILL_CHUNK
from fledge.engine.llm.llm import LLM
from fledge.engine.states import read_document
from fledge.engine.states.read_document import PARTIAL, make_room, mark_used, read_kept, source_of
from fledge.engine.states.state_file import identity_of, read_state

TOKENIZER = ByteTokenizer()
IDS = [1 + place * 7 % 256 for place in range(2 * PREFILL_CHUNK + 100)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER, "mine")


def interrupt(_done: int, _total: int) -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_text_is_known_when_it_is_asked_for_again(llm: LLM, tmp_path: Path) -> None:
    first = read_kept(llm, IDS, tmp_path / "a.state", title="book")
    again = read_kept(llm, IDS, tmp_path / "a.state", title="book")
    assert (first.new, again.new) == (len(IDS), 0) and first.card == again.card
    assert equal_states(first.state, llm.read(IDS)) and equal_states(again.state, first.state)
    state, card = read_state(tmp_path / "a.state")
    assert equal_states(state, first.state)
    assert (card.tokens, card.title, card.source) == (len(IDS), "book", source_of(llm, IDS))
    other = read_kept(llm, IDS, tmp_path / "a.state", template="qa", title="book")
    assert other.new == 0 and read_state(tmp_path / "a.state")[1] == replace(card, template="qa")


def test_what_follows_a_known_text_is_all_that_is_read(llm: LLM, tmp_path: Path) -> None:
    read_kept(llm, IDS[:PREFILL_CHUNK], tmp_path / "a.state")
    longer = read_kept(llm, IDS, tmp_path / "a.state")
    assert longer.new == len(IDS) - PREFILL_CHUNK and equal_states(longer.state, llm.read(IDS))


def test_an_interrupted_reading_goes_on_where_it_was(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    for times in (1, 2):
        with pytest.raises(Interrupted, match=f"{times * PREFILL_CHUNK:,} of {len(IDS):,} tokens"):
            read_kept(llm, IDS, path, progress=interrupt)
        assert [entry.name for entry in tmp_path.iterdir()] == [f"a.state{PARTIAL}"]
    done = read_kept(llm, IDS, path)
    assert done.new == 100 and equal_states(done.state, llm.read(IDS))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.state"]


def test_a_reading_that_was_killed_has_left_its_parts(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, _total: int) -> None:
        if done > PREFILL_CHUNK:
            raise Killed

    monkeypatch.setattr(read_document, "OFTEN", PREFILL_CHUNK)
    with pytest.raises(Killed):
        read_kept(llm, IDS, tmp_path / "a.state", progress=kill)
    assert read_kept(llm, IDS, tmp_path / "a.state").new == len(IDS) - PREFILL_CHUNK


def test_another_text_model_or_beginning_is_never_taken_for_this_one(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    read_kept(llm, IDS, path)
    changed = [*IDS[:-1], IDS[-1] % 256 + 1]
    assert read_kept(llm, changed, path).new == len(changed)
    read_kept(llm, IDS, path)
    begun = replace(llm, start=llm.read("in another mood"))
    assert identity_of(begun) == identity_of(llm) and source_of(begun, IDS) != source_of(llm, IDS)
    assert read_kept(begun, IDS, path).new == len(IDS)
    read_kept(llm, IDS, path)
    assert read_kept(replace(llm, altered="00"), IDS, path).new == len(IDS)
    path.write_bytes(b"damaged")
    assert read_kept(llm, IDS, path).new == len(IDS)
    with pytest.raises(UsageError, match="no tokens"):
        read_kept(llm, [], path)


def test_a_disk_that_fails_costs_the_file_and_not_the_state(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    told: list[OSError] = []
    done = read_kept(llm, IDS[:5], tmp_path / "file" / "a.state", trouble=told.append)
    assert equal_states(done.state, llm.read(IDS[:5])) and len(told) == 1
    with pytest.raises(OSError):
        read_kept(llm, IDS[:5], tmp_path / "file" / "a.state")


def test_room_is_made_by_what_was_not_used_for_longest(tmp_path: Path) -> None:
    for age, name in enumerate(("old.state", f"older.state{PARTIAL}", "oldest.state", "ancient.text")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    mark_used(tmp_path / "oldest.state")
    make_room(tmp_path, 25)
    assert {path.name for path in tmp_path.iterdir()} == {"old.state", "oldest.state", "ancient.text"}
    make_room(tmp_path / "missing", 25)
    mark_used(tmp_path / "missing")
