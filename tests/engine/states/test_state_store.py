"""The shelf: what was kept is there, for its owner only, after a restart, a kill, and when room runs out."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prefixes import equal_bits, state_of

from fledge.core.errors import FledgeError, StateError, UsageError
from fledge.engine.states.state_file import StateMetadata, encode_state
from fledge.engine.states.store import SessionConflict, StateStore
from fledge.models.state import State, WkvState

SUPPORT = Path(__file__).resolve().parents[2] / "support"

AMPLE = 1 << 24
CARD = StateMetadata("0" * 64, "model", 3, "world", created="2026-01-01T00:00:00+00:00")


def number(value: int) -> State:
    """A state with recognizable values (and is finite, unlike those of the cache's tests)."""
    state = state_of([value])
    assert isinstance(state, WkvState)
    return WkvState(state.att_shift, state.wkv.nan_to_num(), state.ffn_shift)


SIZE = len(encode_state(number(1), CARD))


@pytest.fixture
def shelf(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path, CARD.identity, limit_bytes=AMPLE)


def test_a_state_is_there_for_its_owner_and_after_a_restart(shelf: StateStore) -> None:
    mine, theirs = shelf.put("me", number(1), CARD, "first"), shelf.put("you", number(2), CARD)
    again = shelf.put("me", number(3), CARD)
    assert [entry.id for entry in shelf.list("me")] == [again, mine]
    assert shelf.totals().states == 3 and shelf.totals().nbytes == sum(
        entry.nbytes for entry in [*shelf.list("me"), *shelf.list("you")]
    )
    shelf.close()
    with_care = StateStore(shelf.folder, CARD.identity, limit_bytes=AMPLE)
    state, card = with_care.get("me", mine)
    assert equal_bits(state, number(1)) and card == CARD
    entry = with_care.describe("me", mine)
    assert (entry.name, entry.metadata) == ("first", CARD)
    for foreign in (theirs, "st_nonsense", ""):
        with pytest.raises(StateError, match="there is no state"):
            with_care.get("me", foreign)
        with pytest.raises(StateError, match="there is no state"):
            with_care.delete("me", foreign)
    with_care.delete("me", mine)
    assert [entry.id for entry in with_care.list("me")] == [again]
    assert len(list((with_care.folder / "states").iterdir())) == 2
    with_care.close()


def test_a_conversation_stands_at_a_state(shelf: StateStore) -> None:
    one, two = shelf.put("me", number(1), CARD), shelf.put("me", number(2), CARD)
    assert shelf.current_state("me", "chat") is None
    shelf.compare_and_set("me", "chat", one, expected=None)
    shelf.compare_and_set("me", "branch", one, expected=None)
    for expected in (None, two):
        with pytest.raises(SessionConflict, match="conversation 'chat' was changed by another request"):
            shelf.compare_and_set("me", "chat", two, expected=expected)
    shelf.compare_and_set("me", "chat", two, expected=one)
    assert [shelf.current_state("me", name) for name in ("chat", "branch")] == [two, one] and shelf.current_state(
        "you", "chat"
    ) is None
    with pytest.raises(StateError):
        shelf.compare_and_set("you", "chat", one, expected=None)
    shelf.delete("me", two)
    assert (
        shelf.current_state("me", "chat") is None
        and shelf.current_state("me", "branch") == one
        and shelf.totals().states == 1
    )
    shelf.close()


def test_room_is_made_by_what_nobody_named(tmp_path: Path) -> None:
    shelf = StateStore(tmp_path, CARD.identity, limit_bytes=int(3.5 * SIZE))
    named = shelf.put("me", number(1), CARD, "keep")
    standing = shelf.put("me", number(2), CARD)
    shelf.compare_and_set("me", "chat", standing, expected=None)
    loose = shelf.put("me", number(3), CARD)
    newer = shelf.put("you", number(4), CARD)
    assert shelf.totals().nbytes <= 3.5 * SIZE
    assert {entry.id for owner in ("me", "you") for entry in shelf.list(owner)} == {named, standing, newer}
    with pytest.raises(StateError):
        shelf.get("me", loose)
    shelf.compare_and_set("you", "chat", newer, expected=None)
    with pytest.raises(FledgeError, match=r"the state store is full, .* delete some states"):
        shelf.put("me", number(5), CARD)
    assert shelf.totals().states == 3
    shelf.close()


def test_nobody_drives_out_what_others_keep(tmp_path: Path) -> None:
    shelf = StateStore(tmp_path, CARD.identity, limit_bytes=int(6.5 * SIZE), owner_share=0.5)
    mine = [shelf.put("me", number(value), CARD) for value in range(2)]
    yours = [shelf.put("you", number(value), CARD) for value in range(6)]
    assert [entry.id for entry in shelf.list("me")] == mine[::-1], "a loop of handles"
    assert [entry.id for entry in shelf.list("you")] == yours[:2:-1]
    shelf.close()
    again = StateStore(tmp_path, CARD.identity, limit_bytes=int(6.5 * SIZE), owner_share=0.5)
    with pytest.raises(FledgeError, match=r"your limit of .* MB of states is reached"):
        for value in range(6):
            again.put("you", number(value), CARD, "named")
    assert [entry.name for entry in again.list("you")] == ["named"] * 3
    again.put("me", number(2), CARD, "me too")
    assert again.totals() == (6, sum(entry.nbytes for owner in ("me", "you") for entry in again.list(owner)))
    again.close()


def test_what_can_have_no_room_drives_nothing_out(tmp_path: Path) -> None:
    shelf = StateStore(tmp_path, CARD.identity, limit_bytes=int(2.5 * SIZE))
    named, loose = shelf.put("me", number(1), CARD, "keep"), shelf.put("me", number(2), CARD)
    with pytest.raises(FledgeError, match="the state store is full"):
        shelf.put("me", State.stack([number(value) for value in range(3)]), CARD)
    assert [entry.id for entry in shelf.list("me")] == [loose, named] and shelf.totals().nbytes <= 2 * SIZE + 10
    shelf.close()


def test_a_state_of_other_weights_is_kept_and_not_handed_out(shelf: StateStore) -> None:
    mine = shelf.put("me", number(1), CARD)
    shelf.close()
    other = StateStore(shelf.folder, "1" * 64, limit_bytes=AMPLE)
    assert [entry.id for entry in other.list("me")] == [mine]
    with pytest.raises(StateError, match=r"was made by model \(0{12}\), not by the loaded model \(1{12}\)"):
        other.get("me", mine)
    other.close()
    again = StateStore(shelf.folder, CARD.identity, limit_bytes=AMPLE)
    assert equal_bits(again.get("me", mine)[0], number(1))
    again.close()


@pytest.mark.parametrize("name", ["\ud800", "two\nlines", "x" * 201])
def test_a_name_that_cannot_be_shown_is_refused(shelf: StateStore, name: str) -> None:
    id = shelf.put("me", number(1), CARD)
    for attempt in (
        lambda: shelf.put("me", number(2), CARD, name),
        lambda: shelf.compare_and_set("me", name, id, expected=None),
    ):
        with pytest.raises(UsageError, match="not a valid name for a state"):
            attempt()
    assert shelf.totals().states == 1 and len(list((shelf.folder / "states").iterdir())) == 1
    shelf.close()


def test_threads_may_share_a_shelf(tmp_path: Path) -> None:
    shelf = StateStore(tmp_path, CARD.identity, limit_bytes=int(20.5 * SIZE))

    def work(owner: str) -> None:
        for value in range(10):
            id = shelf.put(owner, number(value), CARD, "kept" if value == 5 else None)
            if value == 5:
                shelf.compare_and_set(owner, "chat", id, expected=None)
            assert value != 5 or equal_bits(shelf.get(owner, id)[0], number(5))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, "abcd"))
    assert shelf.totals().states == 20 and shelf.totals().nbytes <= 20.5 * SIZE
    assert {path.stem for path in (tmp_path / "states").iterdir()} == {
        entry.id for owner in "abcd" for entry in shelf.list(owner)
    }
    for owner in "abcd":
        head = shelf.current_state(owner, "chat")
        assert head is not None and equal_bits(shelf.get(owner, head)[0], number(5))
    shelf.close()


def test_what_is_damaged_says_so(shelf: StateStore) -> None:
    one, two = shelf.put("me", number(1), CARD), shelf.put("me", number(2), CARD)
    (shelf.folder / "states" / f"{one}.state").write_bytes(b"short")
    (shelf.folder / "states" / f"{two}.state").unlink()
    with pytest.raises(StateError, match=f"the file of {one} is damaged"):
        shelf.get("me", one)
    with pytest.raises(StateError, match=f"the file of {two} cannot be read"):
        shelf.get("me", two)
    shelf.close()
    (shelf.folder / StateStore.INDEX).write_bytes(b"no database" * 500)
    with pytest.raises(FledgeError, match=r"is damaged .* restore a backup"):
        StateStore(shelf.folder, CARD.identity, limit_bytes=AMPLE)
    assert (shelf.folder / "states" / f"{one}.state").exists(), "nothing is thrown away"


def test_one_process_at_a_time(shelf: StateStore) -> None:
    with pytest.raises(UsageError, match="another process uses this folder"):
        StateStore(shelf.folder, CARD.identity, limit_bytes=AMPLE)
    shelf.close()


WRITER = """
import sys
sys.path[:0] = {tests!r}
from test_state_store import AMPLE, CARD, number
from fledge.engine.states.store import StateStore
shelf = StateStore({folder!r}, CARD.identity, limit_bytes={limit})
print("open", flush=True)
for value in range({begin}, 10**9):
    id = shelf.put("me", number(value), CARD)
    shelf.compare_and_set("me", "chat", id, expected=shelf.current_state("me", "chat"))
    print(value, id, flush=True)
"""


@pytest.mark.parametrize("limit", [AMPLE, 10 * SIZE], ids=["ample", "full"])
def test_what_was_kept_survives_a_kill_at_any_moment(tmp_path: Path, limit: int) -> None:
    chooser, promised = random.Random(2), dict[str, int]()
    for attempt in range(5):
        begin = attempt * 1000
        code = WRITER.format(
            tests=[str(Path(__file__).parent), str(SUPPORT)], folder=str(tmp_path), begin=begin, limit=limit
        )
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "open\n"
        time.sleep(chooser.uniform(0.01, 0.2))
        os.kill(writer.pid, signal.SIGKILL)
        lines = writer.stdout.read().splitlines()
        writer.wait()
        writer.stdout.close()
        for value, id in (line.split() for line in lines if len(line.split()) == 2 and len(line.split()[1]) == 25):
            promised[id] = int(value)
        shelf = StateStore(tmp_path, CARD.identity, limit_bytes=limit)
        kept = {entry.id for entry in shelf.list("me")}
        newest = list(promised)[-1:] if limit < AMPLE else list(promised)
        assert kept >= set(newest) and len(kept) <= len(promised) + attempt + 1 and shelf.totals().nbytes <= limit
        assert {f"{id}.state" for id in kept} == {path.name for path in (tmp_path / "states").iterdir()}
        for id in kept:
            state, _ = shelf.get("me", id)
            assert id not in promised or equal_bits(state, number(promised[id]))
        assert shelf.current_state("me", "chat") in kept
        shelf.close()
    assert len(promised) > 10, "the kills came too early to try anything"
