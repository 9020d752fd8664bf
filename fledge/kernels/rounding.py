"""Quantize a dense weight: choose the integers, scales and minima with the smallest error.

int8 uses the scale that reaches the largest number of a group. int4 tries several ranges, from the full range to one
that cuts off a fifth at both ends, and refines each by least squares. So it clips outliers if this costs less than a
coarser grid for the other weights. With `importance`, one number for each input (the mean square of its activations),
errors are weighted by their effect on the output.

The native library does the same about a hundred times as fast. The torch form is its reference and its replacement.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fledge.core.errors import CheckpointError
from fledge.kernels.native_ops import quantize_native
from fledge.kernels.quantized import GROUP, LEVELS, QuantizedMatrix, assemble
from fledge.native.library import library

RANGES = tuple(1.0 - 0.04 * step for step in range(6))


def quantize(weight: Tensor, format: str, importance: Tensor | None = None) -> tuple[QuantizedMatrix, float]:
    """weight (rows, columns), any float dtype -> its "int8" or "int4" form and the weighted sum of squared errors.

    importance: (columns,), not negative. Raises CheckpointError if a weight is not finite or exceeds float16.
    """
    run = quantize_reference if library() is None else quantize_native
    result = run(weight, format, importance)
    if result is None:
        raise CheckpointError(
            f"a weight of {tuple(weight.shape)} has numbers that {format} cannot represent (nan or too large)"
        )
    return result


def quantize_reference(
    weight: Tensor, format: str, importance: Tensor | None = None
) -> tuple[QuantizedMatrix, float] | None:
    """`quantize` in plain torch; None if a number cannot be represented."""
    rows, columns = weight.shape
    w = torch.nn.functional.pad(weight.detach().float(), (0, -columns % GROUP)).view(rows, -1, GROUP)
    by = torch.ones(columns) if importance is None else importance.float()
    by = torch.nn.functional.pad(by, (0, -columns % GROUP), value=float(importance is None)).view(-1, GROUP)
    candidates = _int8_candidates(w) if format == "int8" else _int4_candidates(w, by)
    best: tuple[Tensor, ...] | None = None
    for scale, least in candidates:
        scale, least = scale.half().float(), least.half().float()
        q = _integers(w, scale, least, format)
        error = (by * (w - (q * scale[..., None] + least[..., None])).square()).sum(-1)
        if best is None:
            best = (q, scale, least, error)
        else:
            better = error < best[3]
            best = tuple(
                torch.where(better[..., None] if new.dim() == 3 else better, new, old)
                for new, old in zip((q, scale, least, error), best, strict=True)
            )
    assert best is not None
    q, scale, least, error = best
    total = float(error.double().sum())
    if not (bool(torch.isfinite(scale).all() & torch.isfinite(least).all()) and total < 1e30):
        return None
    return assemble(format, q.flatten(1)[:, :columns], scale, least), total


def _integers(w: Tensor, scale: Tensor, least: Tensor, format: str) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros(()))
    return ((w - least[..., None]) * inverse[..., None]).round().clamp(*LEVELS[format])


def _int8_candidates(w: Tensor) -> list[tuple[Tensor, Tensor]]:
    scale = w.abs().amax(-1) / 127
    return [(scale, torch.zeros_like(scale))]


def _int4_candidates(w: Tensor, by: Tensor) -> list[tuple[Tensor, Tensor]]:
    low, high = w.amin(-1), w.amax(-1)
    middle, radius = (low + high) / 2, (high - low) / 2
    candidates = []
    for part in RANGES:
        scale, least = 2 * part * radius / 15, middle - part * radius
        candidates.append((scale, least))
        q = _integers(w, scale.half().float(), least.half().float(), "int4")
        candidates.append(_least_squares(w, q, by, scale, least))
    return candidates


def _least_squares(w: Tensor, q: Tensor, by: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale and minimum for the integers q; `scale` and `least` if q does not determine them."""
    count, sum_q, sum_x = by.sum(-1), (by * q).sum(-1), (by * w).sum(-1)
    sum_qq, sum_qx = (by * q * q).sum(-1), (by * q * w).sum(-1)
    determinant = count * sum_qq - sum_q * sum_q
    better = (count * sum_qx - sum_q * sum_x) / determinant
    sound = (determinant > 1e-6 * count * sum_qq) & (better > 0)
    return torch.where(sound, better, scale), torch.where(sound, (sum_x - better * sum_q) / count, least)
