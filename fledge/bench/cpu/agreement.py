"""Check that programs compute the same function, by comparing their logits, before any metric is reported.

All programs are compared with one reference. Rounding causes a difference that grows as the weights get coarser. A
wrong file, a wrong order of channels or a lost state causes a difference that rounding cannot explain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fledge.core.errors import FledgeError

ALLOWED = {"fp32": 0.02, "bf16": 0.1, "int8": 0.1, "int4": 0.5}
"""Largest deviation that rounding can cause, by the coarser width of the two programs.

`rwkv` rounds its normalized embedding to bfloat16 even in fp32, and in bf16 it rounds everything it computes. Two
unrelated models have a deviation of about 1.4.
"""

Array = np.ndarray[Any, np.dtype[np.float32]]
LogitArrays = Mapping[str, Array]
"""Input ("prompt", "batch") -> logits, (V,) or (B, V)."""


def compare(logits: LogitArrays, reference: LogitArrays) -> dict[str, dict[str, float]]:
    """Return the differences for each input that both programs have. For a batch it is the largest one."""
    return {name: _difference(logits[name], reference[name]) for name in logits if name in reference}


def check_agreement(case: tuple[str, str], reference: tuple[str, str], differences: Mapping[str, Any]) -> None:
    """Raise FledgeError if two programs compute different functions. case, reference: (name, width)."""
    allowed = max(ALLOWED[case[1]], ALLOWED[reference[1]])
    for name, difference in differences.items():
        if not difference["deviation"] <= allowed:  # NaN fails too
            raise FledgeError(
                f"after the {name}, the logits of {case[0]} and of {reference[0]} differ by "
                f"{difference['deviation']:.2g} of their spread, and rounding explains at most {allowed:g}; the speeds "
                "of programs that compute different results cannot be compared"
            )


def _difference(logits: Array, reference: Array) -> dict[str, float]:
    """The largest of all rows, of three measures.

    deviation: root mean square difference, relative to the spread of the logits. largest: largest difference, relative
    to the largest logit. divergence_nats: Kullback-Leibler divergence of the next token's probabilities.
    """
    logits, reference = np.atleast_2d(logits).astype(np.float64), np.atleast_2d(reference).astype(np.float64)
    gap = logits - reference
    deviation = np.sqrt((gap**2).mean(axis=1)) / reference.std(axis=1)
    largest = np.abs(gap).max(axis=1) / np.abs(reference).max(axis=1)
    p, q = _log_softmax(reference), _log_softmax(logits)
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    measures = {"deviation": deviation, "largest": largest, "divergence_nats": divergence}
    return {name: float(values.max()) for name, values in measures.items()}


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
