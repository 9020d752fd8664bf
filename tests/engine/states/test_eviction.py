"""Eviction: the owner with the most bytes loses states first, and no owner exceeds their share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fledge.core.errors import FledgeError
from fledge.engine.states.eviction import select_evictions


class FakeStore:
    """Owners with items of size 10, oldest first. Items in capital letters cannot be evicted."""

    def __init__(self, limit: int, share: float = 1.0, **owners: str) -> None:
        self.limit, self.share, self.owners = limit, share, owners

    def put(self, owner: str, name: str) -> str:
        """Store an item, and return the evicted items with their owners."""
        used = {each: 10 * len(names) for each, names in self.owners.items()}
        evictions = select_evictions(owner, 10, used, self.evictable, self.limit, self.share)
        for evicted, item, _ in evictions:
            self.owners[evicted] = self.owners[evicted].replace(item, "", 1)
        self.owners[owner] = self.owners.get(owner, "") + name
        return "".join(f"{evicted}{item}" for evicted, item, _ in evictions)

    def evictable(self, owner: str) -> Iterator[tuple[str, int]]:
        return ((name, 10) for name in self.owners.get(owner, "") if name.islower())


def test_owner_who_keeps_storing_replaces_their_own_states() -> None:
    store = FakeStore(60, a="klm")
    assert [store.put("b", name) for name in "uvwxyz"] == ["", "", "", "bu", "bv", "bw"]
    assert store.owners == {"a": "klm", "b": "xyz"}


def test_new_owner_gets_an_equal_part() -> None:
    store = FakeStore(60, a="klm", b="xyz")
    assert [store.put("c", name) for name in "pqrs"] == ["ak", "bx", "cp", "cq"]
    assert store.owners == {"a": "lm", "b": "yz", "c": "rs"}
    store = FakeStore(60, a="KLM", b="Xyz")
    assert [store.put("c", name) for name in "pqrs"] == ["by", "cp", "cq", "cr"], (
        "states that cannot be evicted count too"
    )


def test_owner_cannot_exceed_their_share() -> None:
    store = FakeStore(60, 0.5, a="klm")
    assert store.put("a", "n") == "ak"
    for name in "RST":
        store.put("a", name)
    with pytest.raises(FledgeError, match=r"your limit of .* MB of states is reached: states with a name"):
        store.put("a", "n")
    assert [store.put("b", name) for name in "XYZ"] == [""] * 3, "other owners are not affected"
    with pytest.raises(FledgeError, match="the state store is full"):
        store.put("c", "p")


def test_state_that_cannot_fit_evicts_nothing() -> None:
    store = FakeStore(30, a="kL", b="X")
    with pytest.raises(FledgeError, match="the state store is full"):
        select_evictions("a", 20, {"a": 20, "b": 10}, store.evictable, 30)
    with pytest.raises(FledgeError, match="the state store is full"):
        select_evictions("c", 31, {}, store.evictable, 30)
