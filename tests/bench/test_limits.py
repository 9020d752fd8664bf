"""The machine's limits: measured small here, and how several measurements become a limit."""

from __future__ import annotations

import torch

from fledge.bench.limits import Limits, measure
from fledge.kernels.native_ops import KINDS
from fledge.native.library import why_missing


def small() -> dict[str, int | float]:
    return {"threads": torch.get_num_threads(), "read_bytes": 1 << 20, "matrix": 32, "seconds": 1e-4}


def test_everything_that_can_be_measured_is() -> None:
    found = measure(small())
    assert found["products"].keys() == {"float32", "bfloat16"} and min(found["products"].values()) > 0
    if why_missing() is None:
        assert found["read"] > 1e6 and found["registers"].keys() == set(KINDS) and found["instruction_set"]
        assert min(found["registers"].values()) > 1e6
    else:
        assert found["read"] is None and found["registers"] == {}


def test_a_limit_is_the_better_of_two_views() -> None:
    one = {"read": 10.0, "registers": {"int16": 5.0, "float32": 7.0}, "products": {"float32": 9.0}}
    two = {"read": 30.0, "registers": {"int16": 7.0, "float32": 8.0}, "products": {"float32": 1.0}}
    limits = Limits.of([{**result, "instruction_set": "some"} for result in (one, two)])
    assert limits.bytes_per_s() == 20.0 and limits.operations_per_s("int4") == 6.0
    assert limits.operations_per_s("fp32") == 7.5 and limits.operations_per_s("bf16") is None
    record = limits.record()
    assert record["read_bytes_per_s"]["values"] == [10.0, 30.0] and record["instruction_set"] == "some"
