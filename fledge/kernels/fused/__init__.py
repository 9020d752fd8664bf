"""The element-wise parts of a model as single operations, for training on a CPU.

torch reads and writes memory once for every multiplication, sum and cast, and this takes about half of a training
step. Each operation here reads its inputs once. `reference` is the specification and runs on any device; `native` runs
in the native library and has a gradient of its own. The functions below choose between them.
"""

from fledge.kernels.fused.dispatch import (
    cross_entropy_,
    gated_norm,
    gated_value,
    mix_tokens,
    squared_relu,
    wkv_with_decay,
)

__all__ = ["cross_entropy_", "gated_norm", "gated_value", "mix_tokens", "squared_relu", "wkv_with_decay"]
