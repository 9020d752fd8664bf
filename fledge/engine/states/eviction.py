"""Whose states go when there is no room for one more: nobody's loop drives out what others keep.

Where all room is taken, whoever holds most gives first, and who asks before others that hold as much: so an owner who
keeps on putting ends up with an equal part and then replaces states of their own. And no owner has more than a share of
all room, named states included, so that one alone can never fill it. Not here: which states of an owner may go, and in
which order (shelf.py, commons.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

from fledge.core.errors import FledgeError

SHARE = 0.5
"""Of all room, what each owner may take where there are several."""

Owner = TypeVar("Owner", bound=Hashable)
Item = TypeVar("Item")


def giving_way(
    owner: Owner,
    size: int,
    held: Mapping[Owner, int],
    free: Callable[[Owner], Iterator[tuple[Item, int]]],
    limit: int,
    share: float = 1.0,
) -> list[tuple[Owner, Item, int]]:
    """What has to go for `size` bytes more of `owner`: whose it is, what, its bytes.

    held: bytes of every owner. free: what may go of an owner, with its bytes, in the order in which it should. limit:
    of all bytes. share: of the limit, for each owner. Raises FledgeError where too little may go.
    """
    left = Counter(held)
    left[owner] += size
    givers = {who: free(who) for who in left}
    victims = list[tuple[Owner, Item, int]]()
    while (over := left[owner] > share * limit) or left.total() > limit:
        if not givers or (over and owner not in givers):
            kept = "without the states that have a name or a conversation there is no room for"
            told = f"{kept} {size / 1e6:.1f} MB more; delete some"
            if over and share < 1:
                raise FledgeError(f"you may keep {share * limit / 1e6:.1f} MB of states here, and {told}")
            raise FledgeError(f"the shelf is full: it holds {limit / 1e6:.1f} MB, and {told}")
        giver = owner if over else max(givers, key=lambda who: (left[who], who == owner))
        found: tuple[Item, int] | None = next(givers[giver], None)
        if found is None:
            del givers[giver]
        else:
            victims.append((giver, *found))
            left[giver] -= found[1]
    return victims
