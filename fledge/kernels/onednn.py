"""Matrix products with weights in oneDNN's own layout, for inference on a CPU.

Memory bandwidth limits a product with one or a few rows, and torch's plain product reads a row-major matrix at about
half of it. oneDNN, which is part of torch on most CPUs, can reorder a matrix once and then reads it near the limit. The
operators are those that torch's own compiler emits. They are not public, so `why_not_packable` tries them first. They
have no gradient. Plain `linear` is the reference.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PACKABLE = (torch.float32, torch.bfloat16)


@lru_cache
def why_not_packable(dtype: torch.dtype) -> str | None:
    """None if weights of this dtype can be packed here, else the reason. Tries it on a small matrix."""
    if dtype not in PACKABLE:
        return f"oneDNN does not pack {str(dtype).removeprefix('torch.')}"
    if not torch.backends.mkldnn.is_available():
        return "this torch does not include oneDNN"
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=g).to(dtype) for shape in ((3, 40), (24, 40)))
    try:
        product = packed_linear(x, pack(weight))
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"oneDNN's operators do not work here: {str(error).splitlines()[0]}"
    difference = (product.double() - x.double() @ weight.double().T).abs().max().item()
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    return None if difference < tolerance else f"oneDNN's product is off by {difference:.1e} here"


def pack(weight: Tensor) -> Tensor:
    """weight (out, in), float32 or bfloat16 on the CPU -> the same matrix in an opaque layout, a copy."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)
    return packed


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """x (..., in) of the weight's dtype -> x W^T (..., out) in the same dtype. No gradient."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], packed.shape[0])
    y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    return y.view(*x.shape[:-1], y.shape[-1])
