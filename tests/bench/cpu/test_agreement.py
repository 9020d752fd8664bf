"""Logits that differ by rounding pass, others do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fledge.bench.cpu.agreement import ALLOWED, check_agreement, compare
from fledge.core.errors import FledgeError


def random_logits(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_measures() -> None:
    a = random_logits(0, 1000)
    same = compare({"prompt": a}, {"prompt": a, "batch": a})["prompt"]
    assert same == {"deviation": 0.0, "largest": 0.0, "divergence_nats": 0.0}
    moved = compare({"prompt": a + 0.1 * a.std()}, {"prompt": a})["prompt"]
    assert moved["deviation"] == pytest.approx(0.1, rel=1e-3) and abs(moved["divergence_nats"]) < 1e-6
    unrelated = compare({"prompt": random_logits(1, 1000)}, {"prompt": a})["prompt"]
    assert unrelated["deviation"] == pytest.approx(2**0.5, rel=0.05) and unrelated["divergence_nats"] > 0.5


def test_the_worst_row_of_a_batch_counts() -> None:
    a = random_logits(0, 3, 50)
    b = a.copy()
    b[1] += 0.2 * a[1].std()
    assert compare({"batch": b}, {"batch": a})["batch"]["deviation"] == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("width", list(ALLOWED))
def test_more_than_rounding(width: str) -> None:
    a = random_logits(0, 50)
    for factor, broken in ((0.9, False), (1.1, True), (float("nan"), True)):
        differences = compare({"prompt": a + factor * ALLOWED[width] * a.std()}, {"prompt": a})
        if broken:
            with pytest.raises(FledgeError, match=r"the logits of theirs and of ours differ by"):
                check_agreement(("theirs", width), ("ours", "fp32"), differences)
        else:
            check_agreement(("theirs", width), ("ours", "fp32"), differences)
