"""L1: the recurrences, each as a readable reference and as faster twins, and the table that chooses between them.

Knows tensors only: no models, no files. `reference` is the specification; a twin enters this room through a test that
compares outputs, final state and every gradient with it.
"""

from fledge.kernels.dispatch import (
    WKV4_BACKENDS,
    WKV4_INFERENCE,
    WKV_BACKENDS,
    WKV_NATIVE,
    BackendChoice,
    explain,
    prepare_tracing,
    wkv,
    wkv4,
)
from fledge.kernels.onednn import pack, packed_linear, why_not
from fledge.kernels.quantized import QuantizedMatrix

__all__ = [
    "WKV4_BACKENDS",
    "WKV4_INFERENCE",
    "WKV_BACKENDS",
    "WKV_NATIVE",
    "BackendChoice",
    "QuantizedMatrix",
    "explain",
    "pack",
    "packed_linear",
    "prepare_tracing",
    "why_not",
    "wkv",
    "wkv4",
]
