"""The World tokenizer's algorithm in native code: the ids of `TrieTokenizer`, some hundred times as fast.

`native/trie.cpp` does the search. What is left to Python must not cost more than that: a list of ids is made by native
code too, through the functions of Python's stable interface, from int objects that exist once for each id. So a list
takes 8 bytes an id instead of 40, and a fifth of the time that `array.tolist()` would.

Here: the declared functions, and the class. Not here: finding the library (fledge.native.library).
"""

from __future__ import annotations

import ctypes
import os
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fledge.core.errors import BackendError, TokenizerError
from fledge.native.library import library, why_missing
from fledge.tokenizer.decoder import Decoder, check_threads, utf8
from fledge.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fledge.tokenizer.base import Ids

WINDOW = 1 << 26
"""Bytes of text that a batch works on at a time: its buffer of ids is twice as large, however many texts there are."""

MANY_IDS = 256
"""Ids from which native decoding saves more than it costs to hand them over."""


class _Calls(ctypes.Structure):
    """`fledge_list_calls`."""

    NAMES = (
        *("PySequence_Repeat", "PyList_SetItem", "Py_IncRef"),
        *("PyEval_SaveThread", "PyEval_RestoreThread", "PyErr_NoMemory"),
    )
    _fields_ = tuple((name, c_void_p) for name in (*NAMES, "seed", "numbers"))


# These run while other Python threads run,
_SIGNATURES: dict[str, tuple[object, list[Any]]] = {
    "fledge_trie_new": (c_void_p, [c_char_p, c_char_p, c_size_t]),
    "fledge_trie_free": (None, [c_void_p]),
    "fledge_trie_encode": (c_int64, [c_void_p, c_char_p, c_size_t, c_void_p, c_size_t]),
    "fledge_trie_encode_batch": (
        c_int64,
        [c_void_p, POINTER(c_char_p), POINTER(c_size_t), c_size_t, c_void_p, c_size_t, POINTER(c_size_t), c_int],
    ),
    "fledge_trie_decode": (c_int64, [c_void_p, c_void_p, c_int, c_size_t, c_void_p, c_size_t]),
}
# and these make Python objects, so they hold Python's lock.
_LOCKED_SIGNATURES: dict[str, tuple[object, list[Any]]] = {
    "fledge_trie_list": (ctypes.py_object, [c_void_p, c_void_p, c_size_t, POINTER(_Calls)]),
    "fledge_trie_encode_list": (ctypes.py_object, [c_void_p, c_char_p, c_size_t, POINTER(_Calls)]),
}


class _Functions(NamedTuple):
    free: Any  # the library's functions, declared; `locked` are those that hold Python's lock
    locked: Any


@lru_cache(maxsize=1)
def _functions() -> _Functions:
    found = library()
    if found is None:
        raise BackendError(str(why_missing()))
    locked = ctypes.PyDLL(None, handle=found._handle)
    for handle, signatures in ((found, _SIGNATURES), (locked, _LOCKED_SIGNATURES)):
        for name, (result, arguments) in signatures.items():
            function = getattr(handle, name, None)
            if function is None:
                raise BackendError(f"the native library has no {name}; install Fledge again")
            function.restype, function.argtypes = result, arguments
    return _Functions(found, locked)


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether a `NativeTokenizer` can be made here."""
    try:
        return bool(_functions())
    except BackendError:
        return False


class _Numbers:
    """The int objects 0 .. size - 1, and where they are: what native code makes lists from."""

    def __init__(self, size: int) -> None:
        self._objects, self._seed = list(range(size)), [None]
        self._addresses = array("Q" if ctypes.sizeof(c_void_p) == 8 else "L", map(id, self._objects))
        calls = [ctypes.cast(getattr(ctypes.pythonapi, name), c_void_p) for name in _Calls.NAMES]
        self.calls = _Calls(*calls, id(self._seed), self._addresses.buffer_info()[0])  # an id is an address


@lru_cache(maxsize=4)
def _numbers(size: int) -> _Numbers:
    """Shared by tokenizers of one size; each holds on to it, since native code knows only addresses."""
    return _Numbers(size)


class NativeTokenizer(Decoder):
    """Greedy longest match for one vocabulary; the methods keep the promises of `Tokenizer`. Safe to share by threads.

    The trie is built by the first `encode`, in some 15 ms for World. While a text of more than 4 KB is encoded, other
    Python threads run.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises BackendError without the native library."""
        super().__init__(vocabulary)
        self._functions = _functions()

    def __reduce__(self) -> tuple[type[NativeTokenizer], tuple[Vocabulary]]:
        return NativeTokenizer, (self.vocabulary,)  # copies and other processes build a trie of their own

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of `text`."""
        data = utf8(text)
        ids: list[int] = self._encode_list(self._trie, data, len(data), self._calls)
        return ids

    def encode_array(self, text: str | bytes) -> Ids:
        """Ids of `text` as a numpy array."""
        import numpy as np

        data = utf8(text)
        size = len(data)
        ids = np.empty(size, self.id_type)
        found = self._functions.free.fledge_trie_encode(self._trie, data, size, ids.ctypes.data, size)
        ids.resize(found, refcheck=False)  # gives the rest of the memory back
        return ids

    def count(self, text: str | bytes) -> int:
        """How many ids `text` has."""
        data = utf8(text)
        found: int = self._functions.free.fledge_trie_encode(self._trie, data, len(data), None, 0)
        return found

    def encode_batch(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[list[int]]:
        """Ids of each text."""
        make, trie, calls = self._functions.locked.fledge_trie_list, self._trie, self._calls
        lists: list[list[int]] = []
        for ids, ends in self._windows(texts, threads):
            address, width, start = ids.ctypes.data, ids.itemsize, 0
            for end in ends:
                lists.append(make(trie, address + width * start, end - start, calls))
                start = end
        return lists

    def encode_batch_arrays(self, texts: Sequence[str | bytes], threads: int | None = None) -> list[Ids]:
        """Ids of each text as numpy arrays."""
        arrays: list[Ids] = []
        for ids, ends in self._windows(texts, threads):
            # Copies, so that one array does not keep the memory of all.
            arrays += [ids[start:end].copy() for start, end in zip([0, *ends], ends, strict=False)]
        return arrays

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`; a numpy array of them is the fastest."""
        found = _as_array(ids)
        if found is None:
            return super().decode_bytes(ids)
        address, count = found.buffer_info() if isinstance(found, array) else (found.ctypes.data, len(found))
        decode, arguments = self._functions.free.fledge_trie_decode, (address, found.itemsize, count)
        size = decode(self._trie, *arguments, None, 0)
        if size < 0:
            raise self.outside(int(found[-1 - size]), -1 - size)
        data = ctypes.create_string_buffer(size)
        decode(self._trie, *arguments, data, size)
        return data.raw

    def _windows(
        self, texts: Sequence[str | bytes], threads: int | None
    ) -> Iterator[tuple[NDArray[np.uint16 | np.uint32], list[int]]]:
        """(ids one behind the other, where those of each text end) of some texts at a time."""
        import numpy as np

        check_threads(threads)
        for window in _windows(texts):
            count, total = len(window), sum(map(len, window))
            ids = np.empty(total, self.id_type)
            ends = (c_size_t * count)()
            found = self._functions.free.fledge_trie_encode_batch(
                *(self._trie, (c_char_p * count)(*window), (c_size_t * count)(*map(len, window)), count),
                *(ids.ctypes.data, total, ends, threads or _cores()),
            )
            if found < 0:
                raise MemoryError(f"no memory for the ids of {total} bytes of text")
            yield ids, list(ends)

    @cached_property
    def _trie(self) -> int:
        """The native trie, freed with this object."""
        tokens = self.vocabulary.tokens
        longest = max(map(len, tokens))
        trie: int | None = None
        if longest < 256:
            lengths = bytes(map(len, tokens))
            trie = self._functions.free.fledge_trie_new(b"".join(tokens), lengths, len(tokens))
        if not trie:
            raise TokenizerError(
                f"native code cannot hold this vocabulary of {len(tokens)} tokens, the longest of {longest} bytes; "
                'ask for the Python tokenizer instead (backend="python")'
            )
        weakref.finalize(self, self._functions.free.fledge_trie_free, trie)
        return trie

    @cached_property
    def _numbers(self) -> _Numbers:
        return _numbers(self.vocab_size)

    @cached_property
    def _calls(self) -> Any:
        return ctypes.byref(self._numbers.calls)

    @cached_property
    def _encode_list(self) -> Any:
        return self._functions.locked.fledge_trie_encode_list


def _windows(texts: Sequence[str | bytes]) -> Iterator[list[bytes]]:
    """The texts as bytes, in lists of about WINDOW bytes."""
    window: list[bytes] = []
    size = 0
    for text in texts:
        window.append(utf8(text))
        size += len(window[-1])
        if size >= WINDOW:
            yield window
            window, size = [], 0
    if window:
        yield window


def _as_array(ids: Iterable[int]) -> Any:
    """Ids that native code can read, or None where plain Python is as good or has to say what is wrong with them."""
    if isinstance(ids, list):
        try:
            return array("q", ids) if len(ids) >= MANY_IDS else None
        except (TypeError, OverflowError):
            return None
    if not hasattr(ids, "__array_interface__"):
        return None
    import numpy as np

    found = np.asarray(ids)
    # Read as unsigned, a negative int32 is far outside any vocabulary; a negative int16 might not be.
    fits = found.ndim == 1 and found.dtype.str[1:] in ("u2", "u4", "i4", "u8", "i8") and found.dtype.isnative
    return np.ascontiguousarray(found) if fits and len(found) else None


@lru_cache(maxsize=1)
def _cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
