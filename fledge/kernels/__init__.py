"""L1: the recurrences and products, each as a readable reference and as faster backends, and the choice among them.

This package works on tensors only: it contains no models and no files. `reference` is the specification. A test
compares the outputs, final state and every gradient of each backend with it.
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
from fledge.kernels.onednn import pack, packed_linear, why_not_packable
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
    "why_not_packable",
    "wkv",
    "wkv4",
]
