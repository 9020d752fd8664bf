"""What every tokenizer of Fledge can do: the one interface the rooms above rely on.

Here: the `Tokenizer` protocol and the value that means "no end-of-text id". Not here: any vocabulary or algorithm.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

NO_EOS = -1
"""The `eos_id` of a vocabulary without an end-of-text id. It equals no id, so `id == tokenizer.eos_id` stays right."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text or bytes to ids, and back without loss."""

    @property
    def vocab_size(self) -> int:
        """Rows a model's embedding and head need: every id is in [0, vocab_size). 65536 for World."""

    @property
    def eos_id(self) -> int:
        """The id between documents (0 for World), or `NO_EOS`. `encode` never produces it."""

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of `text` (a str counts as its UTF-8 bytes; bytes need not be valid UTF-8).

        Raises TokenizerError for a str with a lone surrogate, which UTF-8 cannot carry.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD. Raises TokenizerError as `decode_bytes` does."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`. The end-of-text id and reserved ids stand for no bytes.

        Raises TokenizerError for an id outside [0, vocab_size).
        """
