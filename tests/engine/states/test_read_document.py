"""Documents that are read once: exact states after any interruption, and no mix-up with other texts."""

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
from fledge.engine.states.read_document import PARTIAL, evict_oldest, mark_used, source_hash
from fledge.engine.states.state_file import read_state

TOKENIZER = ByteTokenizer()
IDS = [1 + place * 7 % 256 for place in range(2 * PREFILL_CHUNK + 100)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER, "mine")


def interrupt(_done: int, _total: int) -> None:
    signal.raise_signal(signal.SIGINT)


def test_second_read_of_a_text_uses_the_file(llm: LLM, tmp_path: Path) -> None:
    first = llm.read_document(IDS, tmp_path / "a.state", title="book")
    again = llm.read_document(IDS, tmp_path / "a.state", title="book")
    assert (first.new_tokens, again.new_tokens) == (len(IDS), 0) and first.metadata == again.metadata
    assert equal_states(first.state, llm.read(IDS)) and equal_states(again.state, first.state)
    state, card = read_state(tmp_path / "a.state")
    assert equal_states(state, first.state)
    assert (card.tokens, card.title, card.source) == (len(IDS), "book", source_hash(llm.read([]), IDS))
    other = llm.read_document(IDS, tmp_path / "a.state", template="qa", title="book")
    assert other.new_tokens == 0 and read_state(tmp_path / "a.state")[1] == replace(card, template="qa")


def test_longer_text_reads_only_the_rest(llm: LLM, tmp_path: Path) -> None:
    llm.read_document(IDS[:PREFILL_CHUNK], tmp_path / "a.state")
    longer = llm.read_document(IDS, tmp_path / "a.state")
    assert longer.new_tokens == len(IDS) - PREFILL_CHUNK and equal_states(longer.state, llm.read(IDS))


def test_interrupted_read_continues(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    for times in (1, 2):
        with pytest.raises(Interrupted, match=f"{times * PREFILL_CHUNK:,} of {len(IDS):,} tokens"):
            llm.read_document(IDS, path, progress=interrupt)
        assert [entry.name for entry in tmp_path.iterdir()] == [f"a.state{PARTIAL}"]
    done = llm.read_document(IDS, path)
    assert done.new_tokens == 100 and equal_states(done.state, llm.read(IDS))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.state"]


def test_killed_read_has_saved_a_part(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, _total: int) -> None:
        if done > PREFILL_CHUNK:
            raise Killed

    monkeypatch.setattr(read_document, "SAVE_INTERVAL", PREFILL_CHUNK)
    with pytest.raises(Killed):
        llm.read_document(IDS, tmp_path / "a.state", progress=kill)
    assert llm.read_document(IDS, tmp_path / "a.state").new_tokens == len(IDS) - PREFILL_CHUNK


def test_file_of_another_text_model_or_initial_state_is_not_used(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    llm.read_document(IDS, path)
    changed = [*IDS[:-1], IDS[-1] % 256 + 1]
    assert llm.read_document(changed, path).new_tokens == len(changed)
    llm.read_document(IDS, path)
    begun = replace(llm, initial_state=llm.read("some other text"))
    assert begun.identity == llm.identity and source_hash(begun.read([]), IDS) != source_hash(llm.read([]), IDS)
    assert begun.read_document(IDS, path).new_tokens == len(IDS)
    llm.read_document(IDS, path)
    assert replace(llm, weight_changes="00").read_document(IDS, path).new_tokens == len(IDS)
    path.write_bytes(b"damaged")
    assert llm.read_document(IDS, path).new_tokens == len(IDS)
    with pytest.raises(UsageError, match="no tokens"):
        llm.read_document([], path)


def test_write_error_does_not_lose_the_state(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    errors: list[OSError] = []
    done = llm.read_document(IDS[:5], tmp_path / "file" / "a.state", on_write_error=errors.append)
    assert equal_states(done.state, llm.read(IDS[:5])) and len(errors) == 1
    with pytest.raises(OSError):
        llm.read_document(IDS[:5], tmp_path / "file" / "a.state")


def test_least_recently_used_files_are_evicted(tmp_path: Path) -> None:
    for age, name in enumerate(("old.state", f"older.state{PARTIAL}", "oldest.state", "ancient.text")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    mark_used(tmp_path / "oldest.state")
    evict_oldest(tmp_path, 25)
    assert {path.name for path in tmp_path.iterdir()} == {"old.state", "oldest.state", "ancient.text"}
    evict_oldest(tmp_path / "missing", 25)
    mark_used(tmp_path / "missing")
