"""Scores that differ by rounding pass, others do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fledge.bench.agreement import ALLOWED, check, compare
from fledge.core.errors import FledgeError


def scores(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_measures() -> None:
    a = scores(0, 1000)
    same = compare({"prompt": a}, {"prompt": a, "batch": a})["prompt"]
    assert (same.deviation, same.largest, same.divergence) == (0.0, 0.0, 0.0)
    moved = compare({"prompt": a + 0.1 * a.std()}, {"prompt": a})["prompt"]
    assert moved.deviation == pytest.approx(0.1, rel=1e-3) and abs(moved.divergence) < 1e-6
    strange = compare({"prompt": scores(1, 1000)}, {"prompt": a})["prompt"]
    assert strange.deviation == pytest.approx(2**0.5, rel=0.05) and strange.divergence > 0.5


def test_of_a_batch_the_worst_row_counts() -> None:
    a = scores(0, 3, 50)
    b = a.copy()
    b[1] += 0.2 * a[1].std()
    assert compare({"batch": b}, {"batch": a})["batch"].deviation == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("width", list(ALLOWED))
def test_too_much_for_rounding(width: str) -> None:
    a = scores(0, 50)
    for factor, broken in ((0.9, False), (1.1, True), (float("nan"), True)):
        found = compare({"prompt": a + factor * ALLOWED[width] * a.std()}, {"prompt": a})
        if broken:
            with pytest.raises(FledgeError, match=r"the scores of theirs and of ours differ by"):
                check("theirs", width, found, "ours", "fp32")
        else:
            check("theirs", width, found, "ours", "fp32")
