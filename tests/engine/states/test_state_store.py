"""`StateStore`: states are available to their owner only, after restarts and kills, and until the store is full."""

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
from prefixes import equal_bits
from stored_states import AMPLE, METADATA, SIZE, make_state

from fledge.core.errors import FledgeError, StateError, UsageError
from fledge.engine.states.store import SessionConflict, StateStore
from fledge.models.state import State

SUPPORT = Path(__file__).resolve().parents[2] / "support"


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path, METADATA.identity, limit_bytes=AMPLE)


def test_state_is_available_to_its_owner_and_after_a_restart(store: StateStore) -> None:
    mine, theirs = store.put("me", make_state(1), METADATA, "first"), store.put("you", make_state(2), METADATA)
    again = store.put("me", make_state(3), METADATA)
    assert [entry.id for entry in store.list("me")] == [again, mine]
    assert store.totals().states == 3 and store.totals().nbytes == sum(
        entry.nbytes for entry in [*store.list("me"), *store.list("you")]
    )
    store.close()
    reopened = StateStore(store.folder, METADATA.identity, limit_bytes=AMPLE)
    state, metadata = reopened.get("me", mine)
    assert equal_bits(state, make_state(1)) and metadata == METADATA
    entry = reopened.describe("me", mine)
    assert (entry.name, entry.metadata) == ("first", METADATA)
    for foreign in (theirs, "st_nonsense", ""):
        with pytest.raises(StateError, match="there is no state"):
            reopened.get("me", foreign)
        with pytest.raises(StateError, match="there is no state"):
            reopened.delete("me", foreign)
    reopened.delete("me", mine)
    assert [entry.id for entry in reopened.list("me")] == [again]
    assert len(list((reopened.folder / "states").iterdir())) == 2
    reopened.close()


def test_conversation_has_a_current_state(store: StateStore) -> None:
    one, two = store.put("me", make_state(1), METADATA), store.put("me", make_state(2), METADATA)
    assert store.current_state("me", "chat") is None
    store.compare_and_set("me", "chat", one, expected=None)
    store.compare_and_set("me", "branch", one, expected=None)
    for expected in (None, two):
        with pytest.raises(SessionConflict, match="conversation 'chat' was changed by another request"):
            store.compare_and_set("me", "chat", two, expected=expected)
    store.compare_and_set("me", "chat", two, expected=one)
    assert [store.current_state("me", name) for name in ("chat", "branch")] == [two, one] and store.current_state(
        "you", "chat"
    ) is None
    with pytest.raises(StateError):
        store.compare_and_set("you", "chat", one, expected=None)
    store.delete("me", two)
    assert (
        store.current_state("me", "chat") is None
        and store.current_state("me", "branch") == one
        and store.totals().states == 1
    )
    store.close()


def test_only_states_without_name_and_conversation_are_evicted(tmp_path: Path) -> None:
    store = StateStore(tmp_path, METADATA.identity, limit_bytes=int(3.5 * SIZE))
    named = store.put("me", make_state(1), METADATA, "keep")
    standing = store.put("me", make_state(2), METADATA)
    store.compare_and_set("me", "chat", standing, expected=None)
    loose = store.put("me", make_state(3), METADATA)
    newer = store.put("you", make_state(4), METADATA)
    assert store.totals().nbytes <= 3.5 * SIZE
    assert {entry.id for owner in ("me", "you") for entry in store.list(owner)} == {named, standing, newer}
    with pytest.raises(StateError):
        store.get("me", loose)
    store.compare_and_set("you", "chat", newer, expected=None)
    with pytest.raises(FledgeError, match=r"the state store is full, .* delete some states"):
        store.put("me", make_state(5), METADATA)
    assert store.totals().states == 3
    store.close()


def test_owner_does_not_evict_states_of_others(tmp_path: Path) -> None:
    store = StateStore(tmp_path, METADATA.identity, limit_bytes=int(6.5 * SIZE), owner_share=0.5)
    mine = [store.put("me", make_state(value), METADATA) for value in range(2)]
    yours = [store.put("you", make_state(value), METADATA) for value in range(6)]
    assert [entry.id for entry in store.list("me")] == mine[::-1], "a loop that stores states"
    assert [entry.id for entry in store.list("you")] == yours[:2:-1]
    store.close()
    again = StateStore(tmp_path, METADATA.identity, limit_bytes=int(6.5 * SIZE), owner_share=0.5)
    with pytest.raises(FledgeError, match=r"your limit of .* MB of states is reached"):
        for value in range(6):
            again.put("you", make_state(value), METADATA, "named")
    assert [entry.name for entry in again.list("you")] == ["named"] * 3
    again.put("me", make_state(2), METADATA, "me too")
    assert again.totals() == (6, sum(entry.nbytes for owner in ("me", "you") for entry in again.list(owner)))
    again.close()


def test_state_that_cannot_fit_evicts_nothing(tmp_path: Path) -> None:
    store = StateStore(tmp_path, METADATA.identity, limit_bytes=int(2.5 * SIZE))
    named, loose = store.put("me", make_state(1), METADATA, "keep"), store.put("me", make_state(2), METADATA)
    with pytest.raises(FledgeError, match="the state store is full"):
        store.put("me", State.stack([make_state(value) for value in range(3)]), METADATA)
    assert [entry.id for entry in store.list("me")] == [loose, named] and store.totals().nbytes <= 2 * SIZE + 10
    store.close()


def test_state_of_other_weights_is_stored_but_not_returned(store: StateStore) -> None:
    mine = store.put("me", make_state(1), METADATA)
    store.close()
    other = StateStore(store.folder, "1" * 64, limit_bytes=AMPLE)
    assert [entry.id for entry in other.list("me")] == [mine]
    with pytest.raises(StateError, match=r"was made by model \(0{12}\), not by the loaded model \(1{12}\)"):
        other.get("me", mine)
    other.close()
    again = StateStore(store.folder, METADATA.identity, limit_bytes=AMPLE)
    assert equal_bits(again.get("me", mine)[0], make_state(1))
    again.close()


@pytest.mark.parametrize("name", ["\ud800", "two\nlines", "x" * 201])
def test_name_that_cannot_be_printed_is_rejected(store: StateStore, name: str) -> None:
    id = store.put("me", make_state(1), METADATA)
    for attempt in (
        lambda: store.put("me", make_state(2), METADATA, name),
        lambda: store.compare_and_set("me", name, id, expected=None),
    ):
        with pytest.raises(UsageError, match="not a valid name for a state"):
            attempt()
    assert store.totals().states == 1 and len(list((store.folder / "states").iterdir())) == 1
    store.close()


def test_threads_may_share_a_store(tmp_path: Path) -> None:
    store = StateStore(tmp_path, METADATA.identity, limit_bytes=int(20.5 * SIZE))

    def work(owner: str) -> None:
        for value in range(10):
            id = store.put(owner, make_state(value), METADATA, "kept" if value == 5 else None)
            if value == 5:
                store.compare_and_set(owner, "chat", id, expected=None)
            assert value != 5 or equal_bits(store.get(owner, id)[0], make_state(5))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, "abcd"))
    assert store.totals().states == 20 and store.totals().nbytes <= 20.5 * SIZE
    assert {path.stem for path in (tmp_path / "states").iterdir()} == {
        entry.id for owner in "abcd" for entry in store.list(owner)
    }
    for owner in "abcd":
        current = store.current_state(owner, "chat")
        assert current is not None and equal_bits(store.get(owner, current)[0], make_state(5))
    store.close()


def test_errors_for_damaged_files(store: StateStore) -> None:
    one, two = store.put("me", make_state(1), METADATA), store.put("me", make_state(2), METADATA)
    (store.folder / "states" / f"{one}.state").write_bytes(b"short")
    (store.folder / "states" / f"{two}.state").unlink()
    with pytest.raises(StateError, match=f"the file of {one} is damaged"):
        store.get("me", one)
    with pytest.raises(StateError, match=f"the file of {two} cannot be read"):
        store.get("me", two)
    store.close()
    (store.folder / StateStore.INDEX).write_bytes(b"no database" * 500)
    with pytest.raises(FledgeError, match=r"is damaged .* restore a backup"):
        StateStore(store.folder, METADATA.identity, limit_bytes=AMPLE)
    assert (store.folder / "states" / f"{one}.state").exists(), "nothing is deleted"


def test_second_process_is_rejected(store: StateStore) -> None:
    with pytest.raises(UsageError, match="another process uses this folder"):
        StateStore(store.folder, METADATA.identity, limit_bytes=AMPLE)
    store.close()


WRITER = """
import sys
sys.path[:0] = {tests!r}
from stored_states import METADATA, make_state
from fledge.engine.states.store import StateStore
store = StateStore({folder!r}, METADATA.identity, limit_bytes={limit})
print("open", flush=True)
for value in range({begin}, 10**9):
    id = store.put("me", make_state(value), METADATA)
    store.compare_and_set("me", "chat", id, expected=store.current_state("me", "chat"))
    print(value, id, flush=True)
"""


@pytest.mark.parametrize("limit", [AMPLE, 10 * SIZE], ids=["ample", "full"])
def test_stored_states_survive_a_kill_at_any_moment(tmp_path: Path, limit: int) -> None:
    chooser, promised = random.Random(2), dict[str, int]()
    for attempt in range(5):
        begin = attempt * 1000
        code = WRITER.format(tests=[str(SUPPORT)], folder=str(tmp_path), begin=begin, limit=limit)
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "open\n"
        time.sleep(chooser.uniform(0.01, 0.2))
        os.kill(writer.pid, signal.SIGKILL)
        lines = writer.stdout.read().splitlines()
        writer.wait()
        writer.stdout.close()
        for value, id in (line.split() for line in lines if len(line.split()) == 2 and len(line.split()[1]) == 25):
            promised[id] = int(value)
        store = StateStore(tmp_path, METADATA.identity, limit_bytes=limit)
        kept = {entry.id for entry in store.list("me")}
        newest = list(promised)[-1:] if limit < AMPLE else list(promised)
        assert kept >= set(newest) and len(kept) <= len(promised) + attempt + 1 and store.totals().nbytes <= limit
        assert {f"{id}.state" for id in kept} == {path.name for path in (tmp_path / "states").iterdir()}
        for id in kept:
            state, _ = store.get("me", id)
            assert id not in promised or equal_bits(state, make_state(promised[id]))
        assert store.current_state("me", "chat") in kept
        store.close()
    assert len(promised) > 10, "the kills came too early to try anything"
