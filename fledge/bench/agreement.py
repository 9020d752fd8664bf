"""Do programs compute the same? Their scores of the next token, compared before any figure is given.

All are compared with one reference. Rounding makes a difference, the coarser the weights the larger; a wrong file, a
wrong order of channels or a state that is lost makes one that no rounding explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fledge.core.errors import FledgeError

ALLOWED = {"fp32": 0.02, "bf16": 0.1, "int8": 0.1, "int4": 0.5}
"""Largest deviation that can be rounding, by the coarser width of the two programs.

`rwkv` rounds its normalised embedding to bfloat16 even in fp32, and in bf16 whatever it computes. Two
models that know nothing of each other have a deviation of about 1.4.
"""

Array = np.ndarray[Any, np.dtype[np.float32]]
Scores = Mapping[str, Array]
"""What was read ("prompt", "batch") -> scores, (V,) or (B, V)."""


@dataclass(frozen=True)
class Difference:
    """Of one program to the reference."""

    deviation: float  # root mean square of the differences, relative to the spread of the scores
    largest: float  # difference of a score, relative to the largest score
    divergence: float  # Kullback-Leibler, of the next token's probabilities, in nats

    def record(self) -> dict[str, float]:
        """As JSON."""
        return {"deviation": self.deviation, "largest": self.largest, "divergence_nats": self.divergence}


def compare(found: Scores, reference: Scores) -> dict[str, Difference]:
    """The difference in everything that both have read; of several texts the largest one."""
    return {what: _difference(found[what], reference[what]) for what in found if what in reference}


def check(name: str, width: str, differences: Mapping[str, Difference], reference: str, reference_width: str) -> None:
    """Raise FledgeError where two programs compute different things."""
    allowed = max(ALLOWED[width], ALLOWED[reference_width])
    for what, difference in differences.items():
        if not difference.deviation <= allowed:  # nan is no agreement
            raise FledgeError(
                f"after the {what}, the scores of {name} and of {reference} differ by {difference.deviation:.2g} of "
                f"their spread (up to {allowed:g} can be rounding); figures of programs that compute different things "
                "mean nothing"
            )


def _difference(found: Array, reference: Array) -> Difference:
    found, reference = np.atleast_2d(found).astype(np.float64), np.atleast_2d(reference).astype(np.float64)
    gap = found - reference
    deviation = np.sqrt((gap**2).mean(axis=1)) / reference.std(axis=1)
    largest = np.abs(gap).max(axis=1) / np.abs(reference).max(axis=1)
    p, q = _log_probabilities(reference), _log_probabilities(found)
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    return Difference(float(deviation.max()), float(largest.max()), float(divergence.max()))


def _log_probabilities(scores: Any) -> Any:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
