"""The signatures of all functions of the native library, for ctypes. `native/*.h` declares the same functions."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from typing import Any

Signatures = Mapping[str, tuple[Any, list[Any]]]
"""Function name -> (result type, argument types)."""

KERNEL_SIGNATURES: Signatures = {
    "fledge_instruction_sets": (c_char_p, []),
    "fledge_instruction_set": (c_char_p, []),
    "fledge_select_instruction_set": (c_int, [c_char_p]),
    "fledge_select_product_kernels": (c_int, [c_int32, c_char_p]),
    "fledge_product_kernels": (c_char_p, [c_int32]),
    "fledge_set_threads": (None, [c_int]),
    "fledge_threads": (c_int, []),
    "fledge_packed_bytes": (c_int64, [c_int32, c_int64, c_int64]),
    "fledge_pack": (c_int, [c_int32, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int64, c_void_p]),
    "fledge_quantize": (
        c_double,
        [c_int32, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p],
    ),
    "fledge_matmul": (c_int, [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int32]),
    "fledge_measure_read": (None, [c_void_p, c_int64, c_int64]),
    "fledge_measure_compute": (c_double, [c_int64, c_int32]),
    "fledge_wkv": (c_int, [POINTER(c_int64), *[c_void_p] * 8]),
    "fledge_wkv_gradient": (c_int, [POINTER(c_int64), *[c_void_p] * 14]),
    "fledge_wkv4": (c_int, [POINTER(c_int64), *[c_void_p] * 8]),
    "fledge_mix": (c_int, [c_int32, POINTER(c_int64), *[c_void_p] * 6]),
    "fledge_mix_gradient": (c_int, [c_int32, POINTER(c_int64), *[c_void_p] * 10]),
    "fledge_gated_norm": (c_int, [c_int32, POINTER(c_int64), c_float, *[c_void_p] * 5]),
    "fledge_gated_norm_gradient": (c_int, [c_int32, POINTER(c_int64), c_float, *[c_void_p] * 9]),
    "fledge_cross_entropy": (c_int, [c_int32, c_int64, c_int64, c_float, *[c_void_p] * 3]),
    "fledge_squared_relu": (c_int, [c_int32, c_void_p, c_int64, c_void_p]),
    "fledge_squared_relu_gradient": (c_int, [c_int32, c_void_p, c_void_p, c_int64, c_void_p]),
    "fledge_gated_value": (c_int, [c_int32, c_void_p, c_void_p, c_int64, c_void_p]),
    "fledge_gated_value_gradient": (c_int, [c_int32, *[c_void_p] * 3, c_int64, c_void_p, c_void_p]),
    "fledge_decay": (c_int, [c_int64, c_int64, *[c_void_p] * 3]),
    "fledge_decay_gradient": (c_int, [c_int64, c_int64, *[c_void_p] * 5]),
    "fledge_sample": (c_int, [c_void_p, c_int64, c_int64, c_void_p]),
    "fledge_model_new": (c_void_p, [POINTER(c_int64), c_float, c_float]),
    "fledge_model_free": (None, [c_void_p]),
    "fledge_model_set_vector": (c_int, [c_void_p, c_int64, c_char_p, c_void_p, c_int64]),
    "fledge_model_set_matrix": (c_int, [c_void_p, c_int64, c_char_p, c_int32, c_int64, c_int64, c_void_p]),
    "fledge_model_set_embedding": (None, [c_void_p, c_void_p, c_int32, c_int64, c_int64]),
    "fledge_model_check": (c_char_p, [c_void_p]),
    "fledge_model_forward": (
        c_int,
        [c_void_p, c_void_p, c_int64, c_int64, *[c_void_p] * 3, c_int32, c_void_p, c_int32],
    ),
}
"""Products, recurrences, sampling and whole models. ctypes releases Python's lock during these calls."""


class ListCalls(ctypes.Structure):
    """`fledge_list_calls`: the functions of Python's stable C interface that native code calls to make a list of
    ids."""

    NAMES = (
        *("PySequence_Repeat", "PyList_SetItem", "Py_IncRef"),
        *("PyEval_SaveThread", "PyEval_RestoreThread", "PyErr_NoMemory"),
    )
    _fields_ = tuple((name, c_void_p) for name in (*NAMES, "seed", "numbers"))


TRIE_SIGNATURES: Signatures = {
    "fledge_trie_new": (c_void_p, [c_char_p, c_char_p, c_size_t]),
    "fledge_trie_free": (None, [c_void_p]),
    "fledge_trie_encode": (c_int64, [c_void_p, c_char_p, c_size_t, c_void_p, c_size_t]),
    "fledge_trie_encode_batch": (
        c_int64,
        [c_void_p, POINTER(c_char_p), POINTER(c_size_t), c_size_t, c_void_p, c_size_t, POINTER(c_size_t), c_int],
    ),
    "fledge_trie_decode": (c_int64, [c_void_p, c_void_p, c_int, c_size_t, c_void_p, c_size_t]),
}
"""The tokenizer. ctypes releases Python's lock during these calls."""

TRIE_LIST_SIGNATURES: Signatures = {
    "fledge_trie_list": (ctypes.py_object, [c_void_p, c_void_p, c_size_t, POINTER(ListCalls)]),
    "fledge_trie_encode_list": (ctypes.py_object, [c_void_p, c_char_p, c_size_t, POINTER(ListCalls)]),
}
"""The tokenizer's functions that make Python objects. They need a `ctypes.PyDLL` handle, which keeps Python's lock."""


def declare_functions(handle: ctypes.CDLL, signatures: Signatures) -> str | None:
    """Set the types of the functions on `handle`. Returns the name of the first missing function, or None."""
    for name, (result, arguments) in signatures.items():
        function = getattr(handle, name, None)
        if function is None:
            return name
        function.restype, function.argtypes = result, arguments
    return None
