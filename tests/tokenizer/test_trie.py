"""Greedy longest match: known ids, no loss on any bytes, equal to the plainest search, and errors that help."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.core.errors import TokenizerError
from fledge.tokenizer import (
    Tokenizer,
    TrieTokenizer,
    byte_vocabulary,
    load_world,
    prune,
    world_vocabulary,
)

WORLD = load_world("python")  # native code has tests of its own, which compare it with this
# Every sixth token up to four bytes, and every run of spaces: long matches, gaps in them, and fragments of characters.
KEPT = [*range(257, 20000, 6), *(at for at, token in enumerate(world_vocabulary().tokens) if token.strip(b" ") == b"")]
PRUNED = TrieTokenizer(prune(world_vocabulary(), (token_id for token_id in KEPT if 0 < token_id < 65530), multiple=64))
BYTES = TrieTokenizer(byte_vocabulary())
EACH = pytest.mark.parametrize("tokenizer", [WORLD, PRUNED, BYTES], ids=["world", "pruned", "bytes"])

# Plain random bytes seldom match a long token, so texts are also built from tokens and pieces of them.
PIECES = st.one_of(
    st.binary(max_size=8),
    st.integers(1, 65529).map(lambda token_id: world_vocabulary().tokens[token_id]),
    st.integers(1, 65529).map(lambda token_id: world_vocabulary().tokens[token_id][:-1]),
    st.integers(1, 300).map(lambda count: b" " * count),
    st.text(max_size=8).map(lambda text: text.encode("utf-8", errors="replace")),
)
DATA = st.lists(PIECES, max_size=12).map(b"".join)


def plainest(tokens: tuple[bytes, ...], data: bytes) -> list[int]:
    """The rule itself: of all tokens the rest starts with, the longest."""
    id_of = {token: token_id for token_id, token in enumerate(tokens) if token}
    ids = []
    while data:
        length = next(length for length in range(128, 0, -1) if data[:length] in id_of)
        ids.append(id_of[data[:length]])
        data = data[length:]
    return ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("\n", [11]),
        ("\n\n", [261]),
        ("\r\n", [263]),
        (" ", [33]),
        ("  ", [267]),
        (":", [59]),
        ("User", [24281]),
        (" User", [29956]),
        ("Assistant", [5585, 41693]),
        ("Instruction", [62994]),
        ("Input", [33192]),
        ("Response", [53671]),
        ("\ufffd", [19232]),
        ("\n\n\n", [3328]),
        ("\n\n\n\n", [19239]),
        (" " * 128, [65529]),
        (b"\xff", [256]),
        ("\0", [1]),
    ],
)
def test_known_ids(text: str | bytes, ids: list[int]) -> None:
    assert WORLD.encode(text) == ids
    assert WORLD.decode(ids) == (text if isinstance(text, str) else "\ufffd")


def test_numbers_split_into_pairs() -> None:
    assert [WORLD.decode([token_id]) for token_id in WORLD.encode("2024")] == ["20", "24"]


def test_nothing_is_special() -> None:
    assert WORLD.decode(WORLD.encode("<|endoftext|>")) == "<|endoftext|>"
    assert 0 not in WORLD.encode("<|endoftext|>\0")


def test_every_token_encodes_to_itself() -> None:
    tokens = world_vocabulary().tokens
    assert [WORLD.encode(token) for token in tokens[1:65530]] == [[token_id] for token_id in range(1, 65530)]


@pytest.mark.parametrize("count", [1, 127, 128, 129, 5000])
def test_long_runs_of_spaces(count: int) -> None:
    text = b" " * count
    assert WORLD.encode(text) == plainest(world_vocabulary().tokens, text)


@EACH
def test_the_protocol(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("") == tokenizer.encode(b"") == []
    assert tokenizer.decode([]) == "" and tokenizer.decode_bytes([]) == b""


def test_sizes_and_end_of_text() -> None:
    assert (WORLD.vocab_size, WORLD.eos_id) == (65536, 0)
    assert PRUNED.vocab_size % 64 == 0 and PRUNED.eos_id == 0
    assert (BYTES.vocab_size, BYTES.eos_id) == (256, -1)


@EACH
@given(data=DATA)
def test_bytes_come_back(tokenizer: Tokenizer, data: bytes) -> None:
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")
    assert tokenizer.eos_id not in ids and all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


@EACH
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == tokenizer.encode(text.encode())


@pytest.mark.parametrize("tokenizer", [WORLD, PRUNED, BYTES], ids=["world", "pruned", "bytes"])
@given(data=DATA)
def test_encoding_equals_the_plain_search(tokenizer: TrieTokenizer, data: bytes) -> None:
    assert tokenizer.encode(data) == plainest(tokenizer.vocabulary.tokens, data)


def test_pruned_vocabulary_encodes_the_same_text() -> None:
    whole = TrieTokenizer(prune(world_vocabulary(), range(65530), 70000))
    assert whole.encode("a b  c\n\n漢字") == WORLD.encode("a b  c\n\n漢字")


@EACH
@pytest.mark.parametrize("make_bad", [lambda size: -1, lambda size: size, lambda size: 10**9])
def test_ids_outside_are_named(tokenizer: Tokenizer, make_bad) -> None:
    bad = make_bad(tokenizer.vocab_size)
    with pytest.raises(TokenizerError, match=rf"id {bad} at position 2 .*vocab_size {tokenizer.vocab_size}"):
        tokenizer.decode([5, 6, bad, 7, bad])
    with pytest.raises(TokenizerError, match="position 0"):
        tokenizer.decode_bytes(iter([bad]))


def test_reserved_ids_and_the_end_of_text_are_no_bytes() -> None:
    assert WORLD.decode_bytes([0, *range(65530, 65536)]) == b""
    assert WORLD.decode([24281, 0, 59]) == "User:"
    assert PRUNED.decode([PRUNED.vocab_size - 1]) == ""


def test_incomplete_character_becomes_one_replacement_character() -> None:
    assert WORLD.decode(WORLD.encode("né".encode()[:2]) + WORLD.encode("!")) == "n\ufffd!"


@pytest.mark.parametrize("text", ["\ud800", "fine so far \udcff and on"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(TokenizerError, match=f"character {text.index(chr(ord(max(text))))}"):
        WORLD.encode(text)


def test_threads_may_share_a_new_tokenizer() -> None:
    tokenizer = TrieTokenizer(prune(world_vocabulary(), range(257, 3000)))
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(tokenizer.encode("the same text"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(result == results[0] for result in results)
