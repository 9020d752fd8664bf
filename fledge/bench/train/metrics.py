"""The metrics of `fledge bench train`: rates, memory, shares of the arithmetic, and ratios to the other programs.

Each worker does several steps and contributes their median. The summaries are over workers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fledge.bench.measurement import JobResult, Summary, summarize, summarize_key

DATASHEETS = {  # part of a GPU's name -> peak dense operations per second in its data sheet
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "RTX 4090": {"bf16": 165e12, "fp32": 82.6e12},
}


def step_metrics(results: Sequence[JobResult], tokens: int, operations: int) -> dict[str, Any]:
    """Return the metrics of one program. tokens: per step. operations: per token.

    `cpu_s` is the time of all processors together, which load on the machine affects less than the elapsed time.
    `peak_bytes` on a CPU includes the process itself, which used `before_bytes` before a model existed.
    """

    def medians(*keys: str) -> Summary:
        """Over workers, of the median step. Several keys are added up step by step."""
        steps = [map(sum, zip(*(result[key] for key in keys), strict=True)) for result in results]
        return summarize([statistics.median(seconds) for seconds in steps])

    parts = ("forward_s", "backward_s", "update_s")
    rate = summarize([tokens / seconds for seconds in medians(*parts)["values"]])
    return {
        "tokens_per_s": rate,
        **{key: medians(key) for key in (*parts, "cpu_s")},
        "peak_bytes": summarize_key(results, "peak_bytes"),
        "before_bytes": results[0]["before_bytes"],
        "loss": results[-1]["loss"],
        "operations_per_s": operations * rate["median"],
    }


def compute_targets(programs: Mapping[str, Mapping[str, Any]], family: str) -> dict[str, float]:
    """Return the ratios of medians of the RWKV to the other programs of one dtype and length.

    A ratio of rates above 1, and a ratio of time or memory below 1, is better for the RWKV. Rates use the elapsed time.
    On a machine with other load, only the processor time is reliable.
    """
    own, targets = programs[family], dict[str, float]()
    for name in ("transformer", "chunked", "loop", "fla"):
        other = programs.get(name)
        if other is None or "error" in other:
            continue
        targets[f"rate_to_{name}"] = own["tokens_per_s"]["median"] / other["tokens_per_s"]["median"]
        if name == "loop":  # its step has fewer tokens
            continue
        targets[f"cpu_time_of_{name}"] = own["cpu_s"]["median"] / other["cpu_s"]["median"]
        if own["peak_bytes"] and other["peak_bytes"]:
            targets[f"memory_of_{name}"] = own["peak_bytes"]["median"] / other["peak_bytes"]["median"]
    return targets


def passing_growth(record: Mapping[str, Any]) -> float | None:
    """Return the additional memory of the long row relative to the short row, or None if it was not measured."""
    peaks = record["passing"]["peak_bytes"]
    if len(peaks) < 2:
        return None
    short, long = (peaks[length]["median"] for length in sorted(peaks, key=int))
    return float(long / short - 1)


def model_flop_utilization(operations_per_s: float, gpu: str, dtype: str) -> float | None:
    """Return the share of the operations in the GPU's data sheet, or None on a CPU and for other GPUs."""
    limit = next((limits[dtype] for name, limits in DATASHEETS.items() if name in gpu), None)
    return None if limit is None else operations_per_s / limit
