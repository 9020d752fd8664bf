"""Constructors: the World tokenizer of the package, and the tokenizer of a checkpoint's vocabulary record.

If the native library is present they return the native tokenizer, else the Python one. Both give the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from fledge.core.errors import UsageError
from fledge.tokenizer.base import Tokenizer
from fledge.tokenizer.native_tokenizer import NativeTokenizer, is_available
from fledge.tokenizer.trie import TrieTokenizer
from fledge.tokenizer.vocabulary import Vocabulary, world_vocabulary

Backend = Literal["native", "python"]

BACKENDS: dict[str, type[NativeTokenizer] | type[TrieTokenizer]] = {"native": NativeTokenizer, "python": TrieTokenizer}


def load_world(backend: Backend | None = None) -> Tokenizer:
    """The World tokenizer, V = 65536, made once in a process.

    backend: "native" or "python"; None: native if possible. Raises BackendError for "native" without the library.
    """
    return _world(_choose_backend(backend))


def tokenizer_for(vocabulary: Vocabulary | Mapping[str, Any], backend: Backend | None = None) -> Tokenizer:
    """The tokenizer of a vocabulary, or of its JSON record (`Vocabulary.to_spec`); `backend` as in `load_world`.

    Raises TokenizerError for an invalid record.
    """
    if not isinstance(vocabulary, Vocabulary):
        vocabulary = Vocabulary.from_spec(vocabulary)
    return load_world(backend) if vocabulary.kind == "world" else BACKENDS[_choose_backend(backend)](vocabulary)


def _choose_backend(backend: str | None) -> str:
    if backend is None:
        return "native" if is_available() else "python"
    if backend not in BACKENDS:
        raise UsageError(f"tokenizer backend {backend!r} is unknown; backends: {', '.join(BACKENDS)}")
    return backend


@lru_cache(maxsize=2)
def _world(backend: str) -> Tokenizer:
    return BACKENDS[backend](world_vocabulary())
