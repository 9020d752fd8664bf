"""The metrics of `fledge bench cpu`: rates, shares of the machine's limits, and ratios to the baselines.

bytes per second        bytes of all matrices, read once per token, x decoded tokens per second
operations per second   2 x weights of all matrices except the head, which a prompt needs once, x prefilled tokens
                        per second
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fledge.bench.machine_limits import operations_limit, read_limit
from fledge.bench.measurement import JobResult, Summary, summarize, summarize_key

CaseMetrics = Mapping[str, Any]

RATIOS = {
    "prefill": "prefill_tokens_per_s",
    "decode": "decode_tokens_per_s",
    "batch": "batch_tokens_per_s",
    "load": "load_s",
    "first_token": "first_token_s",
    "peak": "peak_bytes",
    "batch_peak": "batch_peak_bytes",
}
"""Name of a ratio -> the metric that is compared. Smaller is better for times and memory."""


def case_metrics(results: Sequence[JobResult], matrix_bytes: int, settings: Mapping[str, int]) -> dict[str, Any]:
    """Return the metrics of one program and width. settings: "prompt", "tokens" and "batch".

    Loading includes the time to the first token of a short prompt in `first_token_s`. `process_s` is the whole process.
    """

    def rate(tokens: int, key: str) -> Summary | None:
        seconds = summarize_key(results, key)
        return seconds and summarize([tokens / value for value in seconds["values"]])

    rates = {
        "prefill_tokens_per_s": rate(settings["prompt"], "prefill_s"),
        "decode_tokens_per_s": rate(settings["tokens"], "decode_s"),
        "batch_tokens_per_s": rate(settings["tokens"] * settings["batch"], "batch_s"),  # all texts together
    }
    keys = ("import_s", "load_s", "first_token_s", "process_s", "peak_bytes", "batch_peak_bytes")
    return {**rates, **{key: summarize_key(results, key) for key in keys}, "matrix_bytes": matrix_bytes}


def limit_metrics(
    metrics: CaseMetrics, width: str, model: Mapping[str, Any], limits: Mapping[str, Any], batch: int
) -> dict[str, Any]:
    """Return what a case uses of the machine's limits, and the rates that the limits allow with its bytes."""
    weights, head = model["matrix_numbers"], model["head_numbers"]
    reading, arithmetic = read_limit(limits), operations_limit(limits, width)
    bytes_per_s = metrics["decode_tokens_per_s"]["median"] * metrics["matrix_bytes"]
    operations_per_s = metrics["prefill_tokens_per_s"]["median"] * 2 * (weights - head)
    decode = reading and reading / metrics["matrix_bytes"]
    batch_limits = [decode and batch * decode, arithmetic and arithmetic / (2 * weights)]
    return {
        "decode_bytes_per_s": bytes_per_s,
        "share_of_reading": reading and bytes_per_s / reading,
        "prefill_operations_per_s": operations_per_s,
        "share_of_arithmetic": arithmetic and operations_per_s / arithmetic,
        "ceilings_tokens_per_s": {
            "prefill": arithmetic and arithmetic / (2 * (weights - head)),
            "decode": decode,
            "batch": min((limit for limit in batch_limits if limit is not None), default=None),
        },
    }


def compute_targets(cases: Iterable[CaseMetrics]) -> dict[str, dict[str, Any]]:
    """Return, for each width of Fledge, its ratios to the baselines, its shares of the limits and the gain of a batch.

    cases: the "figures" of a record. `rwkv` has no int8 and int4: every width is compared with its best one.
    """
    measured = [case for case in cases if "error" not in case]
    targets: dict[str, dict[str, Any]] = {}
    for own in (case for case in measured if case["program"] == "fledge"):
        llama = [case for case in measured if case["program"] == "llama.cpp" and case["width"] == own["width"]]
        batch, decode = own["batch_tokens_per_s"], own["decode_tokens_per_s"]
        targets[own["width"]] = {
            "to_llama.cpp": ratios(own, llama),
            "to_the_best_rwkv": ratios(own, [case for case in measured if case["program"].startswith("rwkv")]),
            "share_of_reading": own["share_of_reading"],
            "share_of_arithmetic": own["share_of_arithmetic"],
            "batch_gain": batch and batch["median"] / decode["median"],
        }
    return targets


def ratios(own: CaseMetrics, baselines: Sequence[CaseMetrics]) -> dict[str, float]:
    """Return how many times better `own` is than the best baseline, for each metric that both have.

    The ratio of times and memory is inverted: above 1 is always better.
    """
    result = {}
    for name, key in RATIOS.items():
        others = [case[key]["median"] for case in baselines if case[key]]
        if own[key] and others:
            value = own[key]["median"]
            result[name] = value / max(others) if key.endswith("per_s") else min(others) / value
    return result
