"""Eviction of states: which states to delete when a store is full, fairly between owners.

The owner with the most bytes loses states first; between equals, the owner who stores the new state. So an owner who
keeps storing ends up with an equal part and then replaces their own states. No owner may exceed a share of the limit,
named states included, so no single owner can fill the store. The stores decide which states of an owner may be deleted,
and in which order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

from fledge.core.errors import FledgeError

OWNER_SHARE = 0.5
"""The part of the limit that each owner may use if there are several."""

Owner = TypeVar("Owner", bound=Hashable)
Item = TypeVar("Item")


def select_evictions(
    owner: Owner,
    size: int,
    used: Mapping[Owner, int],
    evictable: Callable[[Owner], Iterator[tuple[Item, int]]],
    limit: int,
    owner_share: float = 1.0,
) -> list[tuple[Owner, Item, int]]:
    """The states to delete so that `owner` can store `size` more bytes: (owner, item, bytes) of each.

    used: bytes of each owner. evictable: the states of an owner that may be deleted, with their bytes, in the order of
    deletion. limit: bytes of all owners. owner_share: of the limit, for each owner. Raises FledgeError if not enough
    can be deleted.
    """
    remaining = Counter(used)
    remaining[owner] += size
    candidates = {name: evictable(name) for name in remaining}
    evictions = list[tuple[Owner, Item, int]]()
    while (over_share := remaining[owner] > owner_share * limit) or remaining.total() > limit:
        if not candidates or (over_share and owner not in candidates):
            reason = (
                f"states with a name or a conversation are never evicted, and the others do not free {size / 1e6:.1f} "
                "MB; delete some states"
            )
            if over_share and owner_share < 1:
                raise FledgeError(f"your limit of {owner_share * limit / 1e6:.1f} MB of states is reached: {reason}")
            raise FledgeError(f"the state store is full, with a limit of {limit / 1e6:.1f} MB: {reason}")
        victim = owner if over_share else max(candidates, key=lambda name: (remaining[name], name == owner))
        eviction: tuple[Item, int] | None = next(candidates[victim], None)
        if eviction is None:
            del candidates[victim]
        else:
            evictions.append((victim, *eviction))
            remaining[victim] -= eviction[1]
    return evictions
