"""Who gives way: the one who holds most, and nobody for an owner who has their share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fledge.core.errors import FledgeError
from fledge.engine.states.eviction import select_evictions


class Room:
    """Owners with items of chosen sizes, the oldest first; capital letters stay."""

    def __init__(self, limit: int, share: float = 1.0, **owners: str) -> None:
        self.limit, self.share, self.owners = limit, share, owners

    def put(self, owner: str, name: str) -> str:
        """Put an item of size 10; whose went."""
        held = {who: 10 * len(names) for who, names in self.owners.items()}
        gone = select_evictions(owner, 10, held, self.free, self.limit, self.share)
        for who, item, _ in gone:
            self.owners[who] = self.owners[who].replace(item, "", 1)
        self.owners[owner] = self.owners.get(owner, "") + name
        return "".join(f"{who}{item}" for who, item, _ in gone)

    def free(self, who: str) -> Iterator[tuple[str, int]]:
        return ((name, 10) for name in self.owners.get(who, "") if name.islower())


def test_who_keeps_on_putting_replaces_their_own() -> None:
    room = Room(60, a="klm")
    assert [room.put("b", name) for name in "uvwxyz"] == ["", "", "", "bu", "bv", "bw"]
    assert room.owners == {"a": "klm", "b": "xyz"}


def test_a_newcomer_gets_an_equal_part_of_what_is_taken() -> None:
    room = Room(60, a="klm", b="xyz")
    assert [room.put("c", name) for name in "pqrs"] == ["ak", "bx", "cp", "cq"]
    assert room.owners == {"a": "lm", "b": "yz", "c": "rs"}
    room = Room(60, a="KLM", b="Xyz")
    assert [room.put("c", name) for name in "pqrs"] == ["by", "cp", "cq", "cr"], "what stays counts as well"


def test_nobody_has_more_than_a_share() -> None:
    room = Room(60, 0.5, a="klm")
    assert room.put("a", "n") == "ak"
    for name in "RST":
        room.put("a", name)
    with pytest.raises(FledgeError, match=r"your limit of .* MB of states is reached: states with a name"):
        room.put("a", "n")
    assert [room.put("b", name) for name in "XYZ"] == [""] * 3, "and others go on"
    with pytest.raises(FledgeError, match="the state store is full"):
        room.put("c", "p")


def test_what_can_have_no_room_drives_nothing_out() -> None:
    room = Room(30, a="kL", b="X")
    with pytest.raises(FledgeError, match="the state store is full"):
        select_evictions("a", 20, {"a": 20, "b": 10}, room.free, 30)
    with pytest.raises(FledgeError, match="the state store is full"):
        select_evictions("c", 31, {}, room.free, 30)
