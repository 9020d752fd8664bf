"""The radix tree: matches, values and its size."""

from __future__ import annotations

import pytest

from fledge.engine.prefix_cache.radix_tree import NODE_BYTES, TOKEN_BYTES, RadixTree, pack_ids


def tree_of(*paths: tuple[int, ...]) -> RadixTree[int]:
    """A tree with the index of each path as its value."""
    tree: RadixTree[int] = RadixTree()
    for index, path in enumerate(paths):
        tree.get_or_insert(pack_ids(path)).value = index
    return tree


def match(tree: RadixTree[int], *path: int) -> tuple[list[tuple[int, int | None]], int]:
    nodes, length = tree.match(pack_ids(path))
    return [(node.length, node.value) for node in nodes], length


def test_paths_diverge_where_they_differ() -> None:
    tree = tree_of((1, 2, 3, 4), (1, 2, 300, 4), (1, 2))
    assert match(tree, 1, 2, 3, 4, 5) == ([(2, 2), (4, 0)], 4)
    assert match(tree, 1, 2, 300) == ([(2, 2)], 3)
    assert match(tree, 1, 2, 300 + 256) == ([(2, 2)], 2), "ids with some equal bytes are different"
    assert match(tree, 2) == ([], 0)
    assert match(tree) == ([], 0)
    assert tree.nbytes == 4 * NODE_BYTES + 6 * TOKEN_BYTES


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_the_position_where_two_paths_diverge(length: int) -> None:
    path = tuple(range(1000, 1000 + length))
    tree = tree_of(path)
    for position in {0, length // 3, length - 1}:
        assert match(tree, *path[:position], 5, *path[position:])[1] == position
        assert match(tree, *path[:position])[1] == position


def test_removed_values_leave_no_nodes() -> None:
    tree = tree_of((1, 2, 3, 4), (1, 2, 5), (1,))
    for path, nodes, tokens in (((1,), 4, 5), ((1, 2, 5), 2, 4), ((1, 2, 3, 4), 1, 0)):
        node = tree.get_or_insert(pack_ids(path))
        node.value = None
        tree.prune(node)
        assert tree.nbytes == nodes * NODE_BYTES + tokens * TOKEN_BYTES
    assert not tree.root.children


def test_a_node_with_a_value_or_two_children_stays() -> None:
    tree = tree_of((1, 2), (1, 2, 3), (1, 2, 4))
    (node, *_), _ = tree.match(pack_ids((1, 2)))
    tree.prune(node)
    node.value = None
    tree.prune(node)
    assert match(tree, 1, 2, 4) == ([(2, None), (3, 2)], 3)


def test_an_inserted_path_is_extended_and_gets_values() -> None:
    tree = tree_of()
    leaf = tree.insert(pack_ids((1, 2, 3)))
    assert leaf is not None and tree.insert(pack_ids((1, 2))) is None
    assert tree.insert(pack_ids((1, 2, 3, 4))) is leaf and leaf.length == 4
    assert tree.nbytes == 2 * NODE_BYTES + 4 * TOKEN_BYTES
    tree.get_or_insert(pack_ids((1, 2))).value = 7
    assert match(tree, 1, 2, 3, 4) == ([(2, 7), (4, None)], 4)
    ancestor = leaf.ancestor_with_value
    assert leaf.path == pack_ids((1, 2, 3, 4)) and ancestor is not None and ancestor.value == 7
    assert ancestor.ancestor_with_value is None
