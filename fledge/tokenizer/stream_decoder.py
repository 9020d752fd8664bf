"""Text from a stream of tokens: what is complete comes out at once, half a character waits for its other half.

A token may end in the middle of a character, so decoding each one alone would break text that is right as a whole.
Here: that buffering. Not here: stop texts, which the engine matches on what comes out.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from fledge.tokenizer.base import Tokenizer


class StreamDecoder:
    """Feed ids or bytes in pieces of any size; the texts returned join to `decode` of everything fed.

    Bytes that can no longer become a character turn into U+FFFD at once; a U+FFFD that is really in the text, and ids
    that stand for no bytes (0), pass like any other. After `flush` the decoder is ready for another stream.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is complete now that `ids` have come. Raises TokenizerError as `decode_bytes` does."""
        return self.feed_bytes(self._tokenizer.decode_bytes(ids))

    def feed_bytes(self, data: bytes) -> str:
        """The text that is complete now that `data` has come."""
        text = self._utf8.decode(data)
        # Python's codec waits for the rest of an encoded surrogate (ED A0..BF and one more), which is never valid.
        if self.pending[:1] == b"\xed" and self.pending[1:] >= b"\xa0":
            text += self.flush()
        return text

    def flush(self) -> str:
        """The end of the stream: U+FFFD if it stops within a character, else no text."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    @property
    def pending(self) -> bytes:
        """The bytes that wait: at most three, the start of one character."""
        return self._utf8.getstate()[0]
