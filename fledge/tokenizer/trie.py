"""The World tokenizer's algorithm in plain Python: greedy longest match over UTF-8 bytes. This is the specification.

From left to right, take the longest token that the rest of the text starts with. There is no normalization, no
pre-tokenization and no special token: `<|endoftext|>` in a text is ordinary text. Every byte is a token, so encoding
never fails. (Paper section 5; the tokenizers of RWKV-LM.) `native_tokenizer.py` is about a hundred times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fledge.tokenizer.decoder import Decoder, check_threads, encode_utf8

if TYPE_CHECKING:
    from fledge.tokenizer.base import Ids

Node = dict[int, Any]
"""A trie node: byte -> child node, and LONGEST -> the id of the longest token on the path from the root to this
node."""

LONGEST = -1


class TrieTokenizer(Decoder):
    """Greedy longest match for one vocabulary. Implements `Tokenizer`. Threads may share it.

    The first `encode` builds the trie (a tenth of a second for World), so a program that only decodes does not wait for
    it.
    """

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of `text`."""
        data = encode_utf8(text)
        root, tokens, max_length = self._trie, self.vocabulary.tokens, self._max_token_length
        ids: list[int] = []
        start, size = 0, len(data)
        while start < size:
            node = root
            for byte in data[start : start + max_length]:
                if byte not in node:
                    break
                node = node[byte]
            longest = node[LONGEST]
            ids.append(longest)
            start += len(tokens[longest])
        return ids

    def encode_array(self, text: str | bytes) -> Ids:
        """Ids of `text` as a numpy array."""
        import numpy as np

        return np.array(self.encode(text), dtype=self.id_type)

    def count(self, text: str | bytes) -> int:
        """The number of ids of `text`."""
        return len(self.encode(text))

    def encode_batch(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[list[int]]:
        """Ids of each text. `threads` has no effect: Python runs one thread at a time."""
        check_threads(threads)
        return [self.encode(text) for text in texts]

    def encode_batch_arrays(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[Ids]:
        """Ids of each text as numpy arrays."""
        check_threads(threads)
        return [self.encode_array(text) for text in texts]

    @cached_property
    def _max_token_length(self) -> int:
        """Length in bytes of the longest token."""
        return max(map(len, self.vocabulary.tokens))

    @cached_property
    def _trie(self) -> Node:
        """The root node. Shorter tokens are inserted first, so a new node inherits LONGEST from its parent."""
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
        assert all(byte in root for byte in range(256)), "the vocabulary lacks a token of a single byte"
        return root
