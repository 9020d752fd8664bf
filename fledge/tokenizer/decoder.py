"""Decoding of ids to bytes and text, and checks of arguments, shared by the native and the Python tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from fledge.core.errors import TokenizerError, UsageError
from fledge.tokenizer.vocabulary import Vocabulary


class Decoder:
    """The part of a tokenizer that needs only a vocabulary: sizes and decoding."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of rows that a model needs."""
        return self.vocabulary.size

    @property
    def eos_id(self) -> int:
        """The end-of-text id, or NO_EOS."""
        return self.vocabulary.eos_id

    @property
    def id_type(self) -> Literal["uint16", "uint32"]:
        """The numpy type of arrays of ids."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, with U+FFFD in place of bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`."""
        ids = list(ids)
        tokens = self.vocabulary.tokens
        if ids and not 0 <= min(ids) <= max(ids) < len(tokens):
            position = next(index for index, token_id in enumerate(ids) if not 0 <= token_id < len(tokens))
            raise self.out_of_range_error(ids[position], position)
        return b"".join([tokens[token_id] for token_id in ids])

    def out_of_range_error(self, token_id: int, position: int) -> TokenizerError:
        """The error for an id outside the vocabulary."""
        return TokenizerError(
            f"id {token_id} at position {position} is outside the vocabulary (vocab_size {self.vocab_size}, "
            f"ids 0..{self.vocab_size - 1}); do the ids come from a model with another vocabulary?"
        )


def encode_utf8(text: str | bytes) -> bytes:
    """The bytes of a text. Raises TokenizerError for a str with a lone surrogate."""
    if not isinstance(text, str):
        return text if isinstance(text, bytes) else bytes(memoryview(text))
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate, {text[error.start]!r} at character {error.start}, which UTF-8 cannot "
            "encode; pass the original bytes, or replace it first"
        ) from error


def check_threads(threads: int | None) -> None:
    """Raises UsageError for a number of threads below 1."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads} is too small: at least 1")
