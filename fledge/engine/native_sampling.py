"""Sampling in the native library: the tokens of all sequences of a batch in one call, in parallel.

The rules are those of `sampling.py`, whose numpy version specifies each token. Every row is sampled independently, so
its token depends neither on the batch nor on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p

from fledge.kernels.native_ops import check_memory, follow_torch_threads, functions

HAS_NAN, HAS_INFINITY, NO_TOKENS, BANNED_ID_OUT_OF_RANGE = -1, -2, -3, -4
"""Results instead of a token: a logit is NaN or infinite, no token is left, a banned id is V or more."""


class NativeSampleInput(ctypes.Structure):
    """The C struct of native/sample.h. It holds addresses only: the arrays must stay alive until the call returns."""

    _fields_ = (
        ("logits", c_void_p),  # (V,) float32, contiguous
        ("allowed_mask", c_void_p),  # (V,) bool, or None
        ("banned_ids", c_void_p),  # int64, none negative
        ("banned_count", c_int64),
        ("previous_ids", c_void_p),  # int64, each below V
        ("previous_count", c_int64),
        ("previous_frequencies", c_void_p),  # float64, one for each of them
        ("presence_penalty", c_double),
        ("frequency_penalty", c_double),
        ("temperature", c_double),
        ("top_p", c_double),
        ("top_k", c_int64),
        ("random", c_double),
    )


def sample(rows: Sequence[NativeSampleInput], vocab_size: int) -> list[int]:
    """The token of each row, or one of the codes above."""
    tokens = (c_int64 * len(rows))()
    follow_torch_threads()
    failed = functions().fledge_sample((NativeSampleInput * len(rows))(*rows), len(rows), vocab_size, tokens)
    check_memory(failed, f"sampling {len(rows)} tokens")
    return list(tokens)
