"""Ready tokenizers: World from the package, or the one a checkpoint's vocabulary record asks for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fledge.tokenizer.base import Tokenizer
from fledge.tokenizer.trie import TrieTokenizer
from fledge.tokenizer.vocabulary import Vocabulary, world_vocabulary


@lru_cache(maxsize=1)
def load_world() -> Tokenizer:
    """The World tokenizer, V = 65536, built once a process."""
    return TrieTokenizer(world_vocabulary())


def tokenizer_for(vocabulary: Vocabulary | Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a vocabulary, or of its JSON record (`Vocabulary.to_spec`). Raises TokenizerError."""
    if not isinstance(vocabulary, Vocabulary):
        vocabulary = Vocabulary.from_spec(vocabulary)
    return load_world() if vocabulary.kind == "world" else TrieTokenizer(vocabulary)
