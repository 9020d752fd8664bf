"""The World tokenizer in native code: the same ids as `TrieTokenizer`, about a hundred times as fast.

The C++ code of `native/` searches the trie. The Python part must not cost more than the search, so native code also
makes the list of ids, through functions of Python's stable C interface, from int objects that exist once for each id. A
list then takes 8 bytes for each id instead of 40, and a fifth of the time of `array.tolist()`.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from ctypes import c_char_p, c_size_t, c_void_p
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fledge.core.device import count_usable_cores
from fledge.core.errors import BackendError, TokenizerError
from fledge.native.library import library, why_missing
from fledge.native.signatures import TRIE_LIST_SIGNATURES, TRIE_SIGNATURES, ListCalls, declare_functions
from fledge.tokenizer.decoder import Decoder, check_threads, encode_utf8
from fledge.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fledge.tokenizer.base import Ids

WINDOW = 1 << 26
"""Bytes of text that a batch encodes at a time. The buffer of ids is twice as large, for any number of texts."""

MIN_NATIVE_IDS = 256
"""Number of ids from which native decoding is faster than Python, including the conversion of the ids."""


class _Functions(NamedTuple):
    unlocked: Any  # functions that release Python's lock, so that other threads run
    locked: Any  # functions that make Python objects and therefore hold Python's lock


@lru_cache(maxsize=1)
def _load_functions() -> _Functions:
    unlocked = library()
    if unlocked is None:
        raise BackendError(str(why_missing()))
    locked = ctypes.PyDLL(None, handle=unlocked._handle)
    for handle, signatures in ((unlocked, TRIE_SIGNATURES), (locked, TRIE_LIST_SIGNATURES)):
        if missing := declare_functions(handle, signatures):
            raise BackendError(f"the native library has no {missing}; install Fledge again")
    return _Functions(unlocked, locked)


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether this installation can make a `NativeTokenizer`."""
    try:
        return bool(_load_functions())
    except BackendError:
        return False


class _IntObjects:
    """The int objects 0 .. size - 1 and their addresses. Native code makes lists from them."""

    def __init__(self, size: int) -> None:
        self._objects, self._seed = list(range(size)), [None]
        self._addresses = array("Q" if ctypes.sizeof(c_void_p) == 8 else "L", map(id, self._objects))
        calls = [ctypes.cast(getattr(ctypes.pythonapi, name), c_void_p) for name in ListCalls.NAMES]
        self.calls = ListCalls(*calls, id(self._seed), self._addresses.buffer_info()[0])  # id() is an address


@lru_cache(maxsize=4)
def _shared_int_objects(size: int) -> _IntObjects:
    """Shared by tokenizers of one size. Each keeps a reference, because native code has only addresses."""
    return _IntObjects(size)


class NativeTokenizer(Decoder):
    """Greedy longest match for one vocabulary. Implements `Tokenizer`. Threads may share it.

    The first `encode` builds the trie, in about 15 ms for World. While a text of more than 4 KB is encoded, other
    Python threads run.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises BackendError without the native library."""
        super().__init__(vocabulary)
        self._functions = _load_functions()

    def __reduce__(self) -> tuple[type[NativeTokenizer], tuple[Vocabulary]]:
        return NativeTokenizer, (self.vocabulary,)  # a copy, or another process, builds its own trie

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of `text`."""
        data = encode_utf8(text)
        ids: list[int] = self._encode_list(self._trie, data, len(data), self._calls)
        return ids

    def encode_array(self, text: str | bytes) -> Ids:
        """Ids of `text` as a numpy array."""
        import numpy as np

        data = encode_utf8(text)
        size = len(data)
        ids = np.empty(size, self.id_type)
        count = self._functions.unlocked.fledge_trie_encode(self._trie, data, size, ids.ctypes.data, size)
        ids.resize(count, refcheck=False)  # returns the unused memory
        return ids

    def count(self, text: str | bytes) -> int:
        """The number of ids of `text`."""
        data = encode_utf8(text)
        count: int = self._functions.unlocked.fledge_trie_encode(self._trie, data, len(data), None, 0)
        return count

    def encode_batch(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[list[int]]:
        """Ids of each text."""
        make_list, trie, calls = self._functions.locked.fledge_trie_list, self._trie, self._calls
        lists: list[list[int]] = []
        for ids, ends in self._encode_windows(texts, threads):
            address, width, start = ids.ctypes.data, ids.itemsize, 0
            for end in ends:
                lists.append(make_list(trie, address + width * start, end - start, calls))
                start = end
        return lists

    def encode_batch_arrays(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[Ids]:
        """Ids of each text as numpy arrays."""
        arrays: list[Ids] = []
        for ids, ends in self._encode_windows(texts, threads):
            # Copies, so that one array does not keep the memory of all arrays.
            arrays += [ids[start:end].copy() for start, end in zip([0, *ends], ends, strict=False)]
        return arrays

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`. A numpy array of ids is the fastest."""
        id_array = _as_array(ids)
        if id_array is None:
            return super().decode_bytes(ids)
        address, count = (
            id_array.buffer_info() if isinstance(id_array, array) else (id_array.ctypes.data, len(id_array))
        )
        decode, arguments = self._functions.unlocked.fledge_trie_decode, (address, id_array.itemsize, count)
        size = decode(self._trie, *arguments, None, 0)
        if size < 0:
            position = -1 - size
            raise self.out_of_range_error(int(id_array[position]), position)
        data = ctypes.create_string_buffer(size)
        decode(self._trie, *arguments, data, size)
        return data.raw

    def _encode_windows(
        self, texts: Sequence[str | bytes], threads: int | None
    ) -> Iterator[tuple[NDArray[np.uint16 | np.uint32], list[int]]]:
        """For some texts at a time: their ids in one array, and the end of each text in it."""
        import numpy as np

        check_threads(threads)
        for window in _split_windows(texts):
            count, total = len(window), sum(map(len, window))
            ids = np.empty(total, self.id_type)
            ends = (c_size_t * count)()
            count_or_error = self._functions.unlocked.fledge_trie_encode_batch(
                *(self._trie, (c_char_p * count)(*window), (c_size_t * count)(*map(len, window)), count),
                *(ids.ctypes.data, total, ends, threads or count_usable_cores()),
            )
            if count_or_error < 0:
                raise MemoryError(f"no memory for the ids of {total} bytes of text")
            yield ids, list(ends)

    @cached_property
    def _trie(self) -> int:
        """The address of the native trie. It is freed together with this object."""
        tokens = self.vocabulary.tokens
        longest = max(map(len, tokens))
        trie: int | None = None
        if longest < 256:
            lengths = bytes(map(len, tokens))
            trie = self._functions.unlocked.fledge_trie_new(b"".join(tokens), lengths, len(tokens))
        if not trie:
            raise TokenizerError(
                f"native code does not support this vocabulary ({len(tokens)} tokens, the longest {longest} bytes); "
                'use the Python tokenizer instead (backend="python")'
            )
        weakref.finalize(self, self._functions.unlocked.fledge_trie_free, trie)
        return trie

    @cached_property
    def _int_objects(self) -> _IntObjects:
        return _shared_int_objects(self.vocab_size)

    @cached_property
    def _calls(self) -> Any:
        return ctypes.byref(self._int_objects.calls)

    @cached_property
    def _encode_list(self) -> Any:
        return self._functions.locked.fledge_trie_encode_list


def _split_windows(texts: Sequence[str | bytes]) -> Iterator[list[bytes]]:
    """The texts as bytes, in lists of about WINDOW bytes."""
    window: list[bytes] = []
    size = 0
    for text in texts:
        window.append(encode_utf8(text))
        size += len(window[-1])
        if size >= WINDOW:
            yield window
            window, size = [], 0
    if window:
        yield window


def _as_array(ids: Iterable[int]) -> Any:
    """Ids that native code can read, or None if Python is as fast or must report an invalid id."""
    if isinstance(ids, list):
        try:
            return array("q", ids) if len(ids) >= MIN_NATIVE_IDS else None
        except (TypeError, OverflowError):
            return None
    if not hasattr(ids, "__array_interface__"):
        return None
    import numpy as np

    id_array = np.asarray(ids)
    # Read as unsigned, a negative int32 is far outside any vocabulary; a negative int16 might not be.
    is_supported = id_array.dtype.str[1:] in ("u2", "u4", "i4", "u8", "i8") and id_array.dtype.isnative
    return np.ascontiguousarray(id_array) if is_supported and id_array.ndim == 1 and len(id_array) else None
