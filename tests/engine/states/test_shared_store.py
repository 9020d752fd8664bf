"""`SharedStateStore`: servers that share a folder accept only states that one of them signed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefixes import equal_bits
from racing import race
from stored_states import METADATA, SECRET, SIZE, make_state, open_shared_store

from fledge.core.errors import FledgeError, StateError
from fledge.engine.states.shared_store import SharedStateStore
from fledge.engine.states.state_file import encode_state
from fledge.engine.states.store import SessionConflict

SUPPORT = Path(__file__).resolve().parents[2] / "support"


def test_one_server_stores_and_another_reads(tmp_path: Path) -> None:
    one, two = open_shared_store(tmp_path), open_shared_store(tmp_path)
    mine, theirs = one.put("me", make_state(1), METADATA, "first"), one.put("you", make_state(2), METADATA)
    again = two.put("me", make_state(3), METADATA)
    state, metadata = two.get("me", mine)
    assert equal_bits(state, make_state(1)) and (metadata.tokens, metadata.title) == (METADATA.tokens, "first")
    assert {entry.id for entry in two.list("me")} == {mine, again} and two.totals().states == 3
    assert two.describe("me", mine).name == "first" and two.totals().nbytes >= 3 * SIZE - 100
    for foreign in (theirs, "st_nonsense", "../../x", "st_" + "/" * 22):
        for attempt in (two.get, two.describe, two.delete):
            with pytest.raises(StateError, match="there is no state"):
                attempt("me", foreign)
    one.compare_and_set("me", "chat", mine, expected=None)
    assert two.current_state("me", "chat") == mine and two.current_state("you", "chat") is None
    for expected in (None, again):
        with pytest.raises(SessionConflict, match="conversation 'chat' was changed by another request"):
            two.compare_and_set("me", "chat", again, expected=expected)
    two.delete("me", mine)
    assert one.current_state("me", "chat") is None
    with pytest.raises(StateError):
        one.get("me", mine)


def test_state_deleted_while_files_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server deletes the file after it was listed."""
    store = open_shared_store(tmp_path)
    gone, stays = store.put("me", make_state(1), METADATA), store.put("you", make_state(2), METADATA)
    listing = Path.glob

    def late(self: Path, pattern: str) -> Iterator[Path]:
        found = list(listing(self, pattern))
        open_shared_store(tmp_path)._file("me", gone).unlink(missing_ok=True)
        yield from found

    monkeypatch.setattr(Path, "glob", late)
    assert store.totals() == (1, store.describe("you", stays).nbytes) and store.list("me") == []


MOVER = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from stored_states import open_shared_store
from fledge.engine.states.store import SessionConflict
store, won = open_shared_store(Path(sys.argv[1])), 0
print("ready", flush=True)
sys.stdin.readline()
while (current := store.current_state("me", "chat")) != sys.argv[-1]:
    try:
        store.compare_and_set("me", "chat", sys.argv[sys.argv.index(current) + 1], expected=current)
        won += 1
    except SessionConflict:
        pass
print(won)
"""


def test_only_one_server_advances_a_conversation(tmp_path: Path) -> None:
    """Three processes advance one conversation from state to state."""
    store = open_shared_store(tmp_path)
    ids = [store.put("me", make_state(value), METADATA) for value in range(20)]
    store.compare_and_set("me", "chat", ids[0], expected=None)
    won = race(MOVER.format(tests=[str(SUPPORT)]), str(tmp_path), *ids, count=3)
    assert sum(map(int, won)) == len(ids) - 1 and store.current_state("me", "chat") == ids[-1]


def test_deleting_a_state_does_not_delete_a_later_conversation_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server advances the conversation while this one deletes it with its state."""
    store, errors, unlink = open_shared_store(tmp_path), list[type[Exception]](), Path.unlink
    one, two = store.put("me", make_state(1), METADATA), store.put("me", make_state(2), METADATA)
    store.compare_and_set("me", "chat", one, expected=None)

    def move() -> None:
        try:
            open_shared_store(tmp_path).compare_and_set("me", "chat", two, expected=one)
        except SessionConflict as error:
            errors.append(type(error))

    other = threading.Thread(target=move)

    def late(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".json":
            other.start()
            other.join(0.2)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    store.delete("me", one)
    other.join()
    assert store.current_state("me", "chat") is None and errors == [SessionConflict]


def test_unsigned_state_is_rejected(tmp_path: Path) -> None:
    store = open_shared_store(tmp_path)
    id = store.put("me", make_state(1), METADATA)
    (file,) = tmp_path.glob("*/states/*.state")
    file.write_bytes(encode_state(make_state(2), METADATA))
    with pytest.raises(StateError, match="damaged: it was not signed with"):
        store.get("me", id)
    file.write_bytes(b"")
    with pytest.raises(StateError, match="damaged"):
        store.get("me", id)
    assert store.list("me") == []


def test_only_states_without_name_and_conversation_are_evicted(tmp_path: Path) -> None:
    store = open_shared_store(tmp_path, limit=int(3.5 * SIZE))
    named, standing, loose = (
        store.put("me", make_state(1), METADATA, "keep"),
        *(store.put("me", make_state(n), METADATA) for n in (2, 3)),
    )
    store.compare_and_set("me", "chat", standing, expected=None)
    newer = store.put("me", make_state(4), METADATA, "too")
    assert {entry.id for entry in store.list("me")} == {named, standing, newer} and loose not in (named, standing)
    with pytest.raises(FledgeError, match="the state store is full"):
        store.put("me", make_state(5), METADATA)


def test_owner_does_not_evict_states_of_others(tmp_path: Path) -> None:
    store = SharedStateStore(tmp_path, METADATA.identity, SECRET, limit_bytes=int(6.5 * SIZE + 600), owner_share=0.5)
    mine = {store.put("me", make_state(value), METADATA) for value in range(2)}
    yours = [store.put("you", make_state(value), METADATA) for value in range(6)]
    assert {entry.id for entry in store.list("me")} == mine, "a loop that stores states"
    assert {entry.id for entry in store.list("you")} == {*yours[3:]}
    with pytest.raises(FledgeError, match=r"your limit of .* MB of states is reached"):
        for value in range(6):
            store.put("you", make_state(value), METADATA, "named")
    assert [entry.name for entry in store.list("you")] == ["named"] * 3
    store.put("me", make_state(2), METADATA, "me too")
    assert store.totals().states == 6
