"""The World tokenizer's algorithm in plain Python: greedy longest match over UTF-8 bytes.

From left to right, take the longest token that the rest of the text starts with. No normalisation, no pre-split, no
special tokens: `<|endoftext|>` in a text is ordinary text. Every byte is itself a token, so encoding never fails.
(Paper section 5; the tokenizers of RWKV-LM.)

Here: that algorithm for any `Vocabulary`. Not here: what a vocabulary holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from fledge.core.errors import TokenizerError
from fledge.tokenizer.vocabulary import Vocabulary

Node = dict[int, Any]
"""A trie node: byte -> child node, and under LONGEST the id of the longest token on the way from the root to here."""

LONGEST = -1


class TrieTokenizer:
    """Greedy longest match for one vocabulary; the methods keep the promises of `Tokenizer`. Safe to share by threads.

    The trie is built by the first `encode`: a tenth of a second for World, which a program that only decodes is spared.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    @property
    def vocab_size(self) -> int:
        """Rows a model needs."""
        return self.vocabulary.size

    @property
    def eos_id(self) -> int:
        """The end-of-text id, or NO_EOS."""
        return self.vocabulary.eos_id

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of `text`."""
        data = _utf8(text) if isinstance(text, str) else text
        root, tokens, reach = self._trie, self.vocabulary.tokens, self._reach
        ids: list[int] = []
        start, size = 0, len(data)
        while start < size:
            node = root
            for byte in data[start : start + reach]:
                if byte not in node:
                    break
                node = node[byte]
            longest = node[LONGEST]
            ids.append(longest)
            start += len(tokens[longest])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, U+FFFD in place of bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`."""
        ids = list(ids)
        tokens = self.vocabulary.tokens
        if ids and not 0 <= min(ids) <= max(ids) < len(tokens):
            position = next(at for at, token_id in enumerate(ids) if not 0 <= token_id < len(tokens))
            raise TokenizerError(
                f"id {ids[position]} at position {position} is outside the vocabulary (vocab_size {len(tokens)}, "
                f"ids 0..{len(tokens) - 1}); do the ids come from a model with another vocabulary?"
            )
        return b"".join([tokens[token_id] for token_id in ids])

    @cached_property
    def _reach(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.vocabulary.tokens))

    @cached_property
    def _trie(self) -> Node:
        """The root node. Shorter tokens go in first, so a new node knows the longest token before it: its parent's."""
        root: Node = {LONGEST: None}
        tokens = self.vocabulary.tokens
        for token_id in sorted(range(len(tokens)), key=lambda token_id: len(tokens[token_id])):
            token = tokens[token_id]
            if not token:
                continue
            node = root
            for byte in token:
                child = node.get(byte)
                if child is None:
                    child = node[byte] = {LONGEST: node[LONGEST]}
                node = child
            node[LONGEST] = token_id
        assert all(byte in root for byte in range(256)), "a vocabulary holds every single byte"
        return root


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate, {text[error.start]!r} at character {error.start}, which UTF-8 cannot "
            "carry; pass the original bytes, or replace it first"
        ) from error
