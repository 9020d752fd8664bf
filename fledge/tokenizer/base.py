"""The `Tokenizer` protocol, the interface of every tokenizer, and the value that means "no end-of-text id"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
    """Ids in one dimension: uint16 if `vocab_size` is at most 65536 (as for World), else uint32."""

NO_EOS = -1
"""The `eos_id` of a vocabulary without an end-of-text id. No id equals it, so `id == tokenizer.eos_id` is false."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text or bytes to ids, and back without loss."""

    @property
    def vocab_size(self) -> int:
        """Number of rows of a model's embedding and head. Every id is in [0, vocab_size). 65536 for World."""

    @property
    def eos_id(self) -> int:
        """The id between documents (0 for World), or `NO_EOS`. `encode` never produces it."""

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`. A str is encoded as UTF-8; bytes need not be valid UTF-8.

        Raises TokenizerError for a str with a lone surrogate, which UTF-8 cannot encode.
        """

    def encode_array(self, text: str | bytes) -> Ids:
        """The ids of `encode` as a numpy array: a quarter of the memory and, in native code, of the time."""

    def count(self, text: str | bytes) -> int:
        """The number of ids that `encode` returns, without a list of them."""

    def encode_batch(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[list[int]]:
        """`encode` of each text. Native code distributes the texts, long ones in parts, over `threads` (default: all
        cores).

        Raises UsageError for threads below 1.
        """

    def encode_batch_arrays(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[Ids]:
        """`encode_array` of each text. Threads help more than in `encode_batch`, where one thread makes the lists."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not valid UTF-8 become U+FFFD. Raises the errors of `decode_bytes`."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`. The end-of-text id and reserved ids have no bytes.

        Raises TokenizerError for an id outside [0, vocab_size).
        """
