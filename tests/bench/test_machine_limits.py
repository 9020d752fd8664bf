"""The machine's limits: measured with small sizes, and combined from several results."""

from __future__ import annotations

import torch

from fledge.bench.machine_limits import measure, operations_limit, read_limit, summarize_limits
from fledge.kernels.native_ops import KINDS
from fledge.native.library import why_missing


def test_every_limit_is_measured() -> None:
    job = {"threads": torch.get_num_threads(), "read_bytes": 1 << 20, "matrix": 32, "seconds": 1e-4}
    result = measure(job)
    assert result["products"].keys() == {"float32", "bfloat16"} and min(result["products"].values()) > 0
    if why_missing() is None:
        assert result["read"] > 1e6 and result["registers"].keys() == set(KINDS) and result["instruction_set"]
        assert min(result["registers"].values()) > 1e6
    else:
        assert result["read"] is None and result["registers"] == {}


def test_a_limit_is_the_better_of_two_measurements() -> None:
    one = {"read": 10.0, "registers": {"int16": 5.0, "float32": 7.0}, "products": {"float32": 9.0}}
    two = {"read": 30.0, "registers": {"int16": 7.0, "float32": 8.0}, "products": {"float32": 1.0}}
    limits = summarize_limits([{**result, "instruction_set": "some"} for result in (one, two)])
    assert read_limit(limits) == 20.0 and operations_limit(limits, "int4") == 6.0
    assert operations_limit(limits, "fp32") == 7.5 and operations_limit(limits, "bf16") is None
    assert limits["read_bytes_per_s"]["values"] == [10.0, 30.0] and limits["instruction_set"] == "some"
