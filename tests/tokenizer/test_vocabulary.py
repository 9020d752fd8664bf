"""Vocabularies: the three kinds, their records, and records nobody should trust."""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.errors import TokenizerError
from fledge.tokenizer import NO_EOS, Vocabulary, byte_vocabulary, prune, world_vocabulary

WORLD = world_vocabulary()


def record(**changes: Any) -> dict[str, Any]:
    """A valid record of a small pruned vocabulary, with some values changed."""
    return {**prune(WORLD, [300, 301, 24281]).to_spec(), **changes}


def packed(*steps: int) -> str:
    """A `kept` value made of these steps."""
    return base64.b64encode(zlib.compress(struct.pack(f"<{len(steps)}H", *steps))).decode()


def test_world() -> None:
    assert (WORLD.size, WORLD.used, WORLD.eos_id) == (65536, 65530, 0)
    assert WORLD.tokens[0] == b"" and WORLD.tokens[65530:] == (b"",) * 6
    assert WORLD.tokens[24281] == b"User" and WORLD.tokens[65529] == b" " * 128
    assert WORLD.world_ids == tuple(range(65530))
    assert world_vocabulary() is WORLD


def test_bytes() -> None:
    vocabulary = byte_vocabulary()
    assert (vocabulary.size, vocabulary.used, vocabulary.eos_id) == (256, 256, NO_EOS)
    assert vocabulary.tokens == tuple(bytes([value]) for value in range(256))
    with pytest.raises(TokenizerError, match="World"):
        _ = vocabulary.world_ids


def test_prune_keeps_world_order_without_gaps() -> None:
    vocabulary = prune(WORLD, [24281, 0, 5, 300, 24281], multiple=64)
    assert vocabulary.tokens[:257] == WORLD.tokens[:257]
    assert vocabulary.tokens[257:259] == (WORLD.tokens[300], b"User")
    assert (vocabulary.used, vocabulary.size, vocabulary.eos_id) == (259, 320, 0)
    assert vocabulary.world_ids == (*range(257), 300, 24281)
    assert [vocabulary.tokens[at] for at in range(259)] == [WORLD.tokens[at] for at in vocabulary.world_ids]


def test_prune_size() -> None:
    assert prune(WORLD, [], 300).size == 300
    assert prune(WORLD, []).size == 257
    assert prune(WORLD, range(65530)).size == 65530
    assert prune(WORLD, [300], multiple=258).size == 258


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        ([65530], {}, "65530"),
        ([-1], {}, "-1"),
        ([70000], {}, "70000"),
        ([300], {"size": 257}, "257"),
        ([300], {"size": 1 << 30}, "too large"),
        ([300], {"multiple": 0}, "multiple 0"),
    ],
)
def test_invalid_pruning_is_rejected(keep: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        prune(WORLD, keep, **options)


def test_only_world_can_be_pruned() -> None:
    with pytest.raises(TokenizerError, match="pruned"):
        prune(prune(WORLD, [300]), [])


@pytest.mark.parametrize(
    "vocabulary", [WORLD, byte_vocabulary(), prune(WORLD, []), prune(WORLD, range(257, 9000, 7), multiple=128)]
)
def test_records_go_through_json(vocabulary: Vocabulary) -> None:
    back = Vocabulary.from_spec(json.loads(json.dumps(vocabulary.to_spec())))
    assert back == vocabulary and hash(back) == hash(vocabulary)
    assert (back.kind, back.tokens, back.kept) == (vocabulary.kind, vocabulary.tokens, vocabulary.kept)


@given(st.sets(st.integers(1, 65529), max_size=50), st.integers(0, 40))
def test_pruned_records_round_trip(keep: set[int], spare: int) -> None:
    vocabulary = prune(WORLD, keep, 257 + len(keep) + spare)
    assert Vocabulary.from_spec(vocabulary.to_spec()) == vocabulary


def test_records_are_small() -> None:
    assert WORLD.to_spec() == {"kind": "world"}
    keep = random.Random(0).sample(range(257, 65530), 8192)
    assert len(json.dumps(prune(WORLD, keep).to_spec())) < 16_000


def test_fingerprints_tell_vocabularies_apart() -> None:
    several = [
        WORLD,
        byte_vocabulary(),
        prune(WORLD, []),
        prune(WORLD, [], 258),
        prune(WORLD, [300]),
        prune(WORLD, [301]),
    ]
    assert len({vocabulary.fingerprint for vocabulary in several}) == len(several)
    assert prune(WORLD, [300]) == prune(WORLD, [300]) != prune(WORLD, [301])
    assert WORLD.fingerprint == Vocabulary("world", WORLD.tokens).fingerprint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "NoneType"),
        ([], "list"),
        ({}, "None"),
        ({"kind": "x" * 10_000}, "unknown"),
        ({"kind": ["world"]}, "unknown"),
        ({"kind": "world", "kept": ""}, "keys"),
        ({"kind": "pruned"}, "keys"),
        (record(extra=1), "keys"),
        (record(count=-1), "count"),
        (record(count=True), "count"),
        (record(count=10**12), "count"),
        (record(count="3"), "count"),
        (record(count=2), "exactly 2"),
        (record(count=4), "exactly 4"),
        (record(size=-1), "size"),
        (record(size=2**40), "size"),
        (record(size=300.0), "size"),
        (record(size=259), "too small"),
        (record(size=261), "SHA-256"),
        (record(sha256="0" * 64), "SHA-256"),
        (record(sha256=None), "SHA-256"),
        (record(kept=None), "NoneType"),
        (record(kept="é"), "unpacked"),
        (record(kept="%%%%"), "unpacked"),
        (record(kept="AAAA"), "unpacked"),
        (record(kept=""), "exactly"),
        (record(kept=packed(300, 0, 1)), "not in increasing order"),
        (record(kept=packed(256, 1, 1)), "256"),
        (record(kept=packed(65535, 65535, 65535)), "65535"),
        (record(kept=packed(300, 1, 65535)), "65836"),
        (record(kept=packed(300, 1, 1)), "SHA-256"),
    ],
)
def test_hostile_records(spec: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Vocabulary.from_spec(spec)
    assert len(str(caught.value)) < 500


def test_a_record_cannot_expand_without_bound() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(100_000_000), 9)).decode()
    with pytest.raises(TokenizerError, match="exactly 3"):
        Vocabulary.from_spec(record(kept=bomb))


def test_record_with_trailing_bytes_is_rejected() -> None:
    raw = base64.b64decode(record()["kept"])
    for damaged in (raw + b"more", raw[:-1]):
        with pytest.raises(TokenizerError, match="exactly 3"):
            Vocabulary.from_spec(record(kept=base64.b64encode(damaged).decode()))
