"""Incremental decoding of a token stream: complete characters are returned, incomplete ones wait for their other bytes.

A token may end in the middle of a character, so decoding each token alone would break valid text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from fledge.tokenizer.base import Tokenizer


class StreamDecoder:
    """Feed ids or bytes in parts of any size. The returned texts join to `decode` of everything fed.

    Bytes that can no longer become a character turn into U+FFFD immediately. A U+FFFD that is part of the text, and ids
    without bytes (0), are handled like any other. After `flush` the decoder is ready for another stream.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete. Raises the errors of `decode_bytes`."""
        return self.feed_bytes(self._tokenizer.decode_bytes(ids))

    def feed_bytes(self, data: bytes) -> str:
        """The text that `data` completes."""
        text = self._utf8.decode(data)
        # Python's codec waits for the rest of an encoded surrogate (ED A0..BF and one more), which is never valid.
        if self.pending[:1] == b"\xed" and self.pending[1:] >= b"\xa0":
            text += self.flush()
        return text

    def flush(self) -> str:
        """End the stream: returns U+FFFD if it stops within a character, else no text."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    @property
    def pending(self) -> bytes:
        """The buffered bytes: at most three, the start of one character."""
        return self._utf8.getstate()[0]
