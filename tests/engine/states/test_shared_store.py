"""A shelf in a folder that several servers see: each answers for the other, and takes only what was signed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefixes import equal_bits
from racing import race
from test_state_store import AMPLE, CARD, SIZE, number

from fledge.core.errors import FledgeError, StateError
from fledge.engine.states.shared_store import SharedStateStore
from fledge.engine.states.state_file import encode_state
from fledge.engine.states.store import SessionConflict

SUPPORT = Path(__file__).resolve().parents[2] / "support"

SECRET = b"s" * 32


def commons(folder: Path, limit: int = AMPLE) -> SharedStateStore:
    return SharedStateStore(folder, CARD.identity, SECRET, limit_bytes=limit)


def test_one_keeps_and_the_other_answers(tmp_path: Path) -> None:
    one, two = commons(tmp_path), commons(tmp_path)
    mine, theirs = one.put("me", number(1), CARD, "first"), one.put("you", number(2), CARD)
    again = two.put("me", number(3), CARD)
    state, card = two.get("me", mine)
    assert equal_bits(state, number(1)) and (card.tokens, card.title) == (CARD.tokens, "first")
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


def test_a_state_that_goes_while_they_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server deletes it between the listing and the look at the file."""
    shelf = commons(tmp_path)
    gone, stays = shelf.put("me", number(1), CARD), shelf.put("you", number(2), CARD)
    listing = Path.glob

    def late(self: Path, pattern: str) -> Iterator[Path]:
        found = list(listing(self, pattern))
        commons(tmp_path)._file("me", gone).unlink(missing_ok=True)
        yield from found

    monkeypatch.setattr(Path, "glob", late)
    assert shelf.totals() == (1, shelf.describe("you", stays).nbytes) and shelf.list("me") == []


MOVER = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from test_shared_store import commons
from fledge.engine.states.store import SessionConflict
shelf, won = commons(Path(sys.argv[1])), 0
print("ready", flush=True)
sys.stdin.readline()
while (head := shelf.current_state("me", "chat")) != sys.argv[-1]:
    try:
        shelf.compare_and_set("me", "chat", sys.argv[sys.argv.index(head) + 1], expected=head)
        won += 1
    except SessionConflict:
        pass
print(won)
"""


def test_a_step_of_a_conversation_is_taken_by_one_server(tmp_path: Path) -> None:
    """Three processes walk one conversation from state to state, each as it finds it."""
    shelf = commons(tmp_path)
    ids = [shelf.put("me", number(value), CARD) for value in range(20)]
    shelf.compare_and_set("me", "chat", ids[0], expected=None)
    here = Path(__file__).parent
    won = race(MOVER.format(tests=[str(here), str(SUPPORT)]), str(tmp_path), *ids, count=3)
    assert sum(map(int, won)) == len(ids) - 1 and shelf.current_state("me", "chat") == ids[-1]


def test_a_step_is_not_lost_to_who_forgets_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server moves the conversation while this one is about to forget it with its state."""
    shelf, told, unlink = commons(tmp_path), list[type[Exception]](), Path.unlink
    one, two = shelf.put("me", number(1), CARD), shelf.put("me", number(2), CARD)
    shelf.compare_and_set("me", "chat", one, expected=None)

    def move() -> None:
        try:
            commons(tmp_path).compare_and_set("me", "chat", two, expected=one)
        except SessionConflict as error:
            told.append(type(error))

    other = threading.Thread(target=move)

    def late(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".json":
            other.start()
            other.join(0.2)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    shelf.delete("me", one)
    other.join()
    assert shelf.current_state("me", "chat") is None and told == [SessionConflict]


def test_what_was_not_signed_is_not_handed_out(tmp_path: Path) -> None:
    shelf = commons(tmp_path)
    id = shelf.put("me", number(1), CARD)
    (file,) = tmp_path.glob("*/states/*.state")
    file.write_bytes(encode_state(number(2), CARD))
    with pytest.raises(StateError, match="damaged: it was not signed with"):
        shelf.get("me", id)
    file.write_bytes(b"")
    with pytest.raises(StateError, match="damaged"):
        shelf.get("me", id)
    assert shelf.list("me") == []


def test_room_is_made_by_what_nobody_named(tmp_path: Path) -> None:
    shelf = commons(tmp_path, limit=int(3.5 * SIZE))
    named, standing, loose = (
        shelf.put("me", number(1), CARD, "keep"),
        *(shelf.put("me", number(n), CARD) for n in (2, 3)),
    )
    shelf.compare_and_set("me", "chat", standing, expected=None)
    newer = shelf.put("me", number(4), CARD, "too")
    assert {entry.id for entry in shelf.list("me")} == {named, standing, newer} and loose not in (named, standing)
    with pytest.raises(FledgeError, match="the state store is full"):
        shelf.put("me", number(5), CARD)


def test_nobody_drives_out_what_others_keep(tmp_path: Path) -> None:
    shelf = SharedStateStore(tmp_path, CARD.identity, SECRET, limit_bytes=int(6.5 * SIZE + 600), owner_share=0.5)
    mine = {shelf.put("me", number(value), CARD) for value in range(2)}
    yours = [shelf.put("you", number(value), CARD) for value in range(6)]
    assert {entry.id for entry in shelf.list("me")} == mine, "a loop of handles"
    assert {entry.id for entry in shelf.list("you")} == {*yours[3:]}
    with pytest.raises(FledgeError, match=r"your limit of .* MB of states is reached"):
        for value in range(6):
            shelf.put("you", number(value), CARD, "named")
    assert [entry.name for entry in shelf.list("you")] == ["named"] * 3
    shelf.put("me", number(2), CARD, "me too")
    assert shelf.totals().states == 6
