"""The draw of tokens in the native library: for all sequences of a batch in one call, side by side.

The rules are those of `sampling.py`, whose numpy version says what each token must be. Every row is drawn by itself, so
its token depends neither on the batch nor on the number of threads. Not here: random streams, and what is remembered
from draw to draw.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p

from fledge.kernels.native_ops import check_memory, follow_torch_threads, functions

NAN_LOGIT, INFINITE_LOGIT, NO_TOKEN, BAN_OUT_OF_RANGE = -1, -2, -3, -4
"""In place of a token: there is NaN or infinity among the scores, no token is left, a banned id is not below V."""


class NativeSampleInput(ctypes.Structure):
    """What `Draw` in native/sample.h is. It holds addresses only: what is there must stay until the call has ended."""

    _fields_ = (
        ("logits", c_void_p),  # (V,) float32, contiguous
        ("allowed", c_void_p),  # (V,) bool, or None
        ("banned", c_void_p),  # int64, none negative
        ("banned_count", c_int64),
        ("known", c_void_p),  # int64, each below V
        ("known_count", c_int64),
        ("times", c_void_p),  # float64, of each known one
        ("presence", c_double),
        ("frequency", c_double),
        ("temperature", c_double),
        ("top_p", c_double),
        ("top_k", c_int64),
        ("number", c_double),
    )


def sample(rows: Sequence[NativeSampleInput], vocab_size: int) -> list[int]:
    """A token for each row, or one of the codes above."""
    found = (c_int64 * len(rows))()
    follow_torch_threads()
    failed = functions().fledge_sample((NativeSampleInput * len(rows))(*rows), len(rows), vocab_size, found)
    check_memory(failed, f"the draw of {len(rows)} tokens")
    return list(found)
