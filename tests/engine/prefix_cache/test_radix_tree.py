"""The tree alone: what it knows of a path, and that it stays as small as it can."""

from __future__ import annotations

import pytest

from fledge.engine.prefix_cache.radix_tree import NODE_BYTES, TOKEN_BYTES, RadixTree, pack_ids


def tree_of(*paths: tuple[int, ...]) -> RadixTree[int]:
    """Each path with its number as the value."""
    tree: RadixTree[int] = RadixTree()
    for number, path in enumerate(paths):
        tree.get_or_insert(pack_ids(path)).value = number
    return tree


def walked(tree: RadixTree[int], *path: int) -> tuple[list[tuple[int, int | None]], int]:
    nodes, known = tree.match(pack_ids(path))
    return [(node.length, node.value) for node in nodes], known


def test_paths_part_where_they_differ() -> None:
    tree = tree_of((1, 2, 3, 4), (1, 2, 300, 4), (1, 2))
    assert walked(tree, 1, 2, 3, 4, 5) == ([(2, 2), (4, 0)], 4)
    assert walked(tree, 1, 2, 300) == ([(2, 2)], 3)
    assert walked(tree, 1, 2, 300 + 256) == ([(2, 2)], 2), "ids that share some of their bytes are two"
    assert walked(tree, 2) == ([], 0)
    assert walked(tree) == ([], 0)
    assert tree.nbytes == 4 * NODE_BYTES + 6 * TOKEN_BYTES


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_the_place_where_two_paths_part_is_found_at_every_length(length: int) -> None:
    path = tuple(range(1000, 1000 + length))
    tree = tree_of(path)
    for place in {0, length // 3, length - 1}:
        assert walked(tree, *path[:place], 5, *path[place:])[1] == place
        assert walked(tree, *path[:place])[1] == place


def test_values_that_go_leave_nothing_behind() -> None:
    tree = tree_of((1, 2, 3, 4), (1, 2, 5), (1,))
    for path, nodes, tokens in (((1,), 4, 5), ((1, 2, 5), 2, 4), ((1, 2, 3, 4), 1, 0)):
        node = tree.get_or_insert(pack_ids(path))
        node.value = None
        tree.prune(node)
        assert tree.nbytes == nodes * NODE_BYTES + tokens * TOKEN_BYTES
    assert not tree.root.children


def test_a_node_with_a_value_or_two_ways_on_stays() -> None:
    tree = tree_of((1, 2), (1, 2, 3), (1, 2, 4))
    (node, *_), _ = tree.match(pack_ids((1, 2)))
    tree.prune(node)
    node.value = None
    tree.prune(node)
    assert walked(tree, 1, 2, 4) == ([(2, None), (3, 2)], 3)


def test_a_learned_path_becomes_longer_and_gets_values() -> None:
    tree = tree_of()
    leaf = tree.insert(pack_ids((1, 2, 3)))
    assert leaf is not None and tree.insert(pack_ids((1, 2))) is None
    assert (
        tree.insert(pack_ids((1, 2, 3, 4))) is leaf
        and leaf.length == 4
        and tree.nbytes == 2 * NODE_BYTES + 4 * TOKEN_BYTES
    )
    tree.get_or_insert(pack_ids((1, 2))).value = 7
    assert walked(tree, 1, 2, 3, 4) == ([(2, 7), (4, None)], 4)
    assert (
        leaf.path == pack_ids((1, 2, 3, 4))
        and leaf.nearest_ancestor_with_value is not None
        and leaf.nearest_ancestor_with_value.value == 7
    )
    assert leaf.nearest_ancestor_with_value.nearest_ancestor_with_value is None
