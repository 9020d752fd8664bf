"""What every tokenizer of Fledge can do: the one interface the rooms above rely on.

Here: the `Tokenizer` protocol and the value that means "no end-of-text id". Not here: any vocabulary or algorithm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
    """Ids in one dimension: uint16 where `vocab_size` is at most 65536, as for World, else uint32."""

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

    def encode_array(self, text: str | bytes) -> Ids:
        """What `encode` gives, as a numpy array: a quarter of the memory, and in native code of the time."""

    def count(self, text: str | bytes) -> int:
        """How many ids `encode` gives, without making them."""

    def encode_batch(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[list[int]]:
        """`encode` of each text. Native code shares the texts, long ones in parts, among `threads` (all cores).

        Raises UsageError for threads below 1.
        """

    def encode_batch_arrays(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[Ids]:
        """`encode_array` of each text, as in `encode_batch`; threads help more here, since lists are made by one."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD. Raises TokenizerError as `decode_bytes` does."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`. The end-of-text id and reserved ids stand for no bytes.

        Raises TokenizerError for an id outside [0, vocab_size).
        """
