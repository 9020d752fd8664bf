"""The native tokenizer: the ids of its Python twin for any bytes and vocabulary, in lanes, batches and threads."""

from __future__ import annotations

import copy
import ctypes
import json
import lzma
import pickle
import random
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.core.errors import BackendError, TokenizerError, UsageError
from fledge.native.library import library, why_missing
from fledge.tokenizer import (
    NativeTokenizer,
    Tokenizer,
    TrieTokenizer,
    Vocabulary,
    byte_vocabulary,
    load_world,
    native_tokenizer,
    prune,
    tokenizer_for,
    world,
    world_vocabulary,
)

pytestmark = pytest.mark.skipif(library() is None, reason=str(why_missing()))

WORLD = world_vocabulary()
TOKENS = WORLD.tokens[1:65530]
LETTERS = (b"a", b"ab", b"aab", b"abab", b"b" * 7, b"a" * 100, b"a" * 63 + b"b", b"ba" * 40)

VOCABULARIES: dict[str, Callable[[], Vocabulary]] = {
    "world": world_vocabulary,
    "wide": lambda: prune(WORLD, range(65530), 70000),  # ids beyond 16 bits
    "pruned": lambda: prune(WORLD, [*range(257, 20000, 6), *range(60000, 65530)], multiple=64),
    "bytes": byte_vocabulary,
    "letters": lambda: Vocabulary("pruned", (b"", *WORLD.tokens[1:257], *LETTERS[1:], b"", b"")),
}


@lru_cache(maxsize=8)
def twins(name: str) -> tuple[NativeTokenizer, TrieTokenizer]:
    """Both tokenizers of one vocabulary."""
    vocabulary = VOCABULARIES[name]()
    return NativeTokenizer(vocabulary), TrieTokenizer(vocabulary)


EACH = pytest.mark.parametrize("name", VOCABULARIES)

# Random bytes seldom match a long token, so texts are also made of tokens, beginnings of tokens and long runs. Short
# pieces many times over are long enough for every lane, and often never let two lanes meet.
PIECES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(TOKENS),
    st.sampled_from(TOKENS).map(lambda token: token[:-1]),
    st.sampled_from(LETTERS),
    st.text(max_size=8).map(lambda text: text.encode("utf-8", errors="replace")),
    st.tuples(st.sampled_from([b" ", b"\n", b"a", b"ab", b"\0", b"\xff", b"\xe4\xb8"]), st.integers(1, 500)).map(
        lambda run: run[0] * run[1]
    ),
)
DATA = st.lists(PIECES, max_size=12).map(b"".join)
LONG = st.tuples(DATA, st.integers(1, 60), DATA).map(lambda parts: parts[0] * parts[1] + parts[2])


def shuffled(seed: int, bytes_at_least: int) -> bytes:
    """Tokens of World in random order: dense in long tokens, of every script."""
    rng = random.Random(seed)
    pieces, size = [], 0
    while size < bytes_at_least:
        pieces.append(rng.choice(TOKENS))
        size += len(pieces[-1])
    return b"".join(pieces)


@EACH
@settings(max_examples=60)
@given(data=LONG)
def test_native_encoding_equals_the_python_implementation(name: str, data: bytes) -> None:
    fast, plain = twins(name)
    ids = plain.encode(data)
    assert fast.encode(data) == ids
    array = fast.encode_array(data)
    assert array.tolist() == ids and array.dtype == plain.encode_array(b"").dtype == fast.id_type
    assert fast.count(data) == plain.count(data) == len(ids)
    assert fast.decode_bytes(ids) == fast.decode_bytes(array) == data


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_a_round_trip(text: str) -> None:
    fast, _ = twins("world")
    assert fast.decode(fast.encode(text)) == text
    assert fast.encode(text) == fast.encode(text.encode()) == fast.encode(bytearray(text.encode()))  # type: ignore[arg-type]


def test_every_token_encodes_to_itself() -> None:
    fast, _ = twins("world")
    assert fast.encode_batch(TOKENS) == [[token_id] for token_id in range(1, 65530)]
    assert [fast.encode(token) for token in TOKENS[::7]] == [[token_id] for token_id in range(1, 65530, 7)]


@EACH
def test_tokens_of_every_script_in_one_long_text(name: str) -> None:
    fast, plain = twins(name)
    data = shuffled(1, 300_000)
    assert fast.encode(data) == plain.encode(data)


@pytest.mark.parametrize("unit", [b" ", b"\n", b"\0", b"\xff", b"ab", b"aab", "é".encode(), "你好".encode(), b" a\n"])
@pytest.mark.parametrize("name", ["world", "letters"])
def test_vector_lanes_that_diverge_give_the_same_ids(name: str, unit: bytes) -> None:
    fast, plain = twins(name)
    for extra in (b"", b"a", b"\n\n"):
        data = extra + unit * (50_000 // len(unit)) + extra
        assert fast.encode(data) == plain.encode(data)
        assert fast.encode_batch([data * 4], threads=3)[0] == plain.encode(data * 4)


@pytest.mark.parametrize("around", [0, 1, 2, 255, 256, 257, 384, 4095, 4096, 4097, 12_288])
def test_lengths_around_every_limit(around: int) -> None:
    fast, plain = twins("world")
    for size in range(max(around - 2, 0), around + 3):
        data = shuffled(size, size)[:size]
        assert fast.encode(data) == plain.encode(data) and fast.count(data) == plain.count(data)


@settings(max_examples=60)
@given(
    tokens=st.lists(st.text("ab", min_size=1, max_size=9).map(str.encode) | st.binary(max_size=255), max_size=20),
    data=st.text("ab", max_size=300).map(str.encode),
    copies=st.integers(1, 20),
)
def test_any_vocabulary(tokens: list[bytes], data: bytes, copies: int) -> None:
    vocabulary = Vocabulary("pruned", (*(bytes([value]) for value in range(256)), *tokens))
    text = data * copies + b"".join(tokens)
    assert NativeTokenizer(vocabulary).encode(text) == TrieTokenizer(vocabulary).encode(text)


def test_the_corpus(shared: Path) -> None:
    files = sorted((shared / "data" / "corpus").glob("*.jsonl.xz"))
    if not files:
        pytest.skip("needs ../shared/data/corpus")
    texts = []
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            documents = [json.loads(next(lines))["text"] for _ in range(300)]
        texts += [text[:6000] for text in documents[::10]]
    fast, plain = twins("world")
    expected = [plain.encode(text) for text in texts]
    assert [fast.encode(text) for text in texts] == expected
    assert fast.encode_batch(texts, threads=2) == expected
    whole = "\n".join(texts)
    assert fast.encode(whole) == plain.encode(whole) and len(whole) > 400_000


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 8])
@pytest.mark.parametrize("name", ["world", "wide", "letters"])
def test_batches(name: str, threads: int | None) -> None:
    fast, plain = twins(name)
    texts: list[str | bytes] = [b"", "a", b"", shuffled(2, 250_000), "é", shuffled(3, 90_000), b" " * 70_000, b""]
    texts += [shuffled(seed, 50 * seed) for seed in range(60)]
    expected = [plain.encode(text) for text in texts]
    assert fast.encode_batch(texts, threads) == expected
    arrays = fast.encode_batch_arrays(texts, threads)
    assert [array.tolist() for array in arrays] == expected and {str(array.dtype) for array in arrays} == {fast.id_type}
    assert all(array.base is None for array in arrays)
    assert plain.encode_batch(texts[:3], threads) == expected[:3] and fast.encode_batch([], threads) == []
    assert [array.tolist() for array in plain.encode_batch_arrays(texts[:3], threads)] == expected[:3]


def test_batches_larger_than_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = twins("world")
    texts = [shuffled(seed, 3000) for seed in range(9)]
    monkeypatch.setattr(native_tokenizer, "WINDOW", 7000)
    assert fast.encode_batch(texts) == [fast.encode(text) for text in texts]


def test_python_threads_share_a_new_tokenizer() -> None:
    tokenizer = NativeTokenizer(WORLD)
    texts = [shuffled(seed, 20_000) for seed in range(4)]
    expected = [twins("world")[1].encode(text) for text in texts]
    results: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        results[number] = [tokenizer.encode(text) for text in texts] + tokenizer.encode_batch(texts, 2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(4)] == [expected * 2] * 4


def test_lists_are_ordinary_lists() -> None:
    fast, _ = twins("world")
    ids = fast.encode("the same the same")
    ids.append(-1)
    assert all(type(token_id) is int for token_id in ids) and fast.encode("the same the same") == ids[:-1]


@pytest.mark.parametrize("kind", ["uint16", "uint32", "int32", "int64", "uint64", "int16", "uint8", ">i4"])
def test_arrays_decode(kind: str) -> None:
    fast, plain = twins("world")
    ids = np.arange(0, 250, dtype=kind)
    expected = plain.decode_bytes(ids.tolist())
    assert fast.decode_bytes(ids) == fast.decode_bytes(ids[::-1][::-1]) == expected
    assert fast.decode_bytes(ids[:0]) == b""
    assert fast.decode_bytes(ids[::3]) == plain.decode_bytes(ids[::3].tolist())


@pytest.mark.parametrize("bad", [-1, -(2**40), 65536, 2**31, 2**62, 2**63 - 1, 2**63, -(10**30), 10**30])
@pytest.mark.parametrize("filler", [1, 400])
def test_ids_outside_are_named(bad: int, filler: int) -> None:
    fast, plain = twins("world")
    ids = [24281] * filler + [bad, 5, bad]
    for tokenizer in (fast, plain):
        with pytest.raises(TokenizerError, match=rf"id {bad} at position {filler} .*vocab_size 65536"):
            tokenizer.decode_bytes(ids)
    for kind in ("int32", "int64", "uint64"):
        if np.iinfo(kind).min <= bad <= np.iinfo(kind).max:
            with pytest.raises(TokenizerError, match=rf"id {bad} at position {filler} "):
                fast.decode_bytes(np.array(ids, dtype=kind))


def test_reserved_ids_and_the_end_of_text_are_no_bytes() -> None:
    fast, _ = twins("world")
    assert fast.decode_bytes([0, *range(65530, 65536)] * 100) == b""
    assert fast.decode([24281, 0, 59] * 100) == "User:" * 100


def test_invalid_lists_of_ids_are_rejected() -> None:
    fast, plain = twins("world")
    for tokenizer in (fast, plain):
        with pytest.raises(TypeError):
            tokenizer.decode_bytes([1.0] * 1000)  # type: ignore[list-item]
        assert tokenizer.decode_bytes(iter([66, 67])) == b"AB"


@pytest.mark.parametrize("text", ["\ud800", "fine so far \udcff and on"])
def test_lone_surrogates_are_refused(text: str) -> None:
    calls: list[Callable[[Tokenizer], Any]] = [
        lambda tokenizer: tokenizer.encode(text),
        lambda tokenizer: tokenizer.encode_array(text),
        lambda tokenizer: tokenizer.count(text),
        lambda tokenizer: tokenizer.encode_batch(["fine", text]),
        lambda tokenizer: tokenizer.encode_batch_arrays(["fine", text]),
    ]
    for tokenizer in twins("world"):
        for call in calls:
            with pytest.raises(TokenizerError, match=f"character {text.index(chr(ord(max(text))))}"):
                call(tokenizer)


@pytest.mark.parametrize("threads", [0, -1])
def test_zero_threads_are_rejected(threads: int) -> None:
    for tokenizer in twins("bytes"):
        for call in (tokenizer.encode_batch, tokenizer.encode_batch_arrays):
            with pytest.raises(UsageError, match=f"threads {threads} "):
                call(["a"], threads)


@pytest.mark.parametrize("text", [None, 5, ["a"]])
def test_values_of_other_types_are_rejected(text: Any) -> None:
    for tokenizer in twins("bytes"):
        with pytest.raises(TypeError):
            tokenizer.encode(text)


def test_vocabularies_that_native_code_cannot_hold() -> None:
    every_byte = tuple(bytes([value]) for value in range(256))
    too_long = NativeTokenizer(Vocabulary("pruned", (*every_byte, b"a" * 256)))
    with pytest.raises(TokenizerError, match=r'the longest 256 bytes.*backend="python"'):
        too_long.encode("a")
    longest = NativeTokenizer(Vocabulary("pruned", (*every_byte, b"a" * 255)))
    assert longest.encode(b"a" * 600) == [256, 256, *[97] * 90]
    for tokens in (every_byte[:97] + every_byte[98:], (*every_byte[:97], b"ab", *every_byte[98:]), ()):
        lengths = bytes(map(len, tokens))
        assert not native_tokenizer._load_functions().unlocked.fledge_trie_new(b"".join(tokens), lengths, len(tokens))


def test_buffers_without_room_are_left_alone() -> None:
    fast, _ = twins("world")
    functions, buffer = native_tokenizer._load_functions().unlocked, (ctypes.c_uint16 * 8)(*[7] * 8)
    assert functions.fledge_trie_encode(fast._trie, b"\0" * 9, 9, buffer, 8) == -1 and list(buffer) == [7] * 8
    assert functions.fledge_trie_decode(fast._trie, buffer, 2, 8, None, 0) == 8


def test_many_sizes_of_vocabulary_at_once() -> None:
    tokenizers = [NativeTokenizer(prune(WORLD, [], 257 + spare)) for spare in range(12)]
    for tokenizer in tokenizers + tokenizers:
        assert tokenizer.encode("az") == [98, 123]


def test_copies_and_pickles() -> None:
    fast, _ = twins("letters")
    fast.encode("a")
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.encode("aabab") == fast.encode("aabab") and other._trie != fast._trie


def test_both_backends_can_be_selected() -> None:
    assert isinstance(load_world("native"), NativeTokenizer) and isinstance(load_world("python"), TrieTokenizer)
    assert load_world() is load_world("native") is tokenizer_for({"kind": "world"})
    assert isinstance(tokenizer_for(byte_vocabulary()), NativeTokenizer)
    assert isinstance(tokenizer_for(byte_vocabulary(), "python"), TrieTokenizer)
    assert isinstance(load_world("native"), Tokenizer) and isinstance(load_world("python"), Tokenizer)
    with pytest.raises(UsageError, match=r"'rust' is unknown.*native, python"):
        load_world("rust")  # type: ignore[arg-type]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_tokenizer, "library", lambda: None)
    monkeypatch.setattr(native_tokenizer, "why_missing", lambda: "the native library was not built")
    monkeypatch.setattr(world, "is_available", native_tokenizer.is_available.__wrapped__)
    native_tokenizer._load_functions.cache_clear()
    try:
        assert isinstance(load_world(), TrieTokenizer)
        with pytest.raises(BackendError, match="was not built"):
            tokenizer_for(byte_vocabulary(), "native")
    finally:
        native_tokenizer._load_functions.cache_clear()
