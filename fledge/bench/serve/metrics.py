"""The metrics of `fledge bench serve`: rates, percentiles, and whether the targets are met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fledge.bench.measurement import summarize
from fledge.bench.suite import CaseRuns

PREFIXES = {"server": "", "cached": "cached_", "engine": "engine_"}
"""Program -> prefix of its keys. The baseline has `peer_`."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is at least as large as this share of all values."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)]


def load_metrics(clients: int, tokens: int, runs: Mapping[str, CaseRuns]) -> dict[str, Any]:
    """Return the metrics of one number of clients. The times of all repeats are pooled, the rates are not.

    tokens: per run. runs: "server", "engine", and optionally "cached" and the baseline by its name.
    """
    metrics: dict[str, Any] = {"clients": clients}
    for name, run in runs.items():
        prefix = PREFIXES.get(name, "peer_")
        if run.error:
            metrics[f"{prefix}error"] = run.error
            continue
        metrics[f"{prefix}tokens_per_s"] = summarize([tokens / result["seconds"] for result in run.results])
        for key in ("first_s", "gaps_s") if name != "engine" else ():
            metrics[prefix + key] = _median_and_p95([value for result in run.results for value in result[key]])
    server = runs["server"].results
    events = [len(result["first_s"]) + len(result["gaps_s"]) for result in server]
    metrics["overhead"] = 1 - metrics["tokens_per_s"]["median"] / metrics["engine_tokens_per_s"]["median"]
    metrics["client_cores"] = max(result["client_cores"] for result in server)
    metrics["tokens_per_event"] = statistics.median(tokens / count for count in events)
    return metrics


def _median_and_p95(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "p95": percentile(values, 0.95)} if values else None


def compute_targets(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return name, value, limit and whether it is met, for each target that can be computed from the record."""
    targets = _load_targets(record["loads"])
    for document in record["documents"]:
        if document["tokens"] == 32768:
            for name in ("warm_s", "handle_s"):
                extra = statistics.median(document[name]) - statistics.median(document["question_s"])
                targets.append(_target(f"32k tokens, {name[:-2]}: s beyond the question", extra, 0.1))
    if store := record["state_store"]:
        targets.append(_target("resume over HTTP, median s", statistics.median(store["resume_s"]), 0.02))
        for name, prefix in (("filling", ""), ("resuming", "server_")):
            before, after = store[f"{prefix}before_bytes"], store[f"{prefix}after_bytes"]
            if before and after:
                targets.append(_target(f"memory after {name} / before", after / before, 1.1))
    return targets


def _load_targets(loads: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    targets, by_clients = list[dict[str, Any]](), {load["clients"]: load for load in loads}
    one, many = by_clients.get(1), by_clients.get(16)
    if one and many:
        rate = one["tokens_per_s"]["median"]
        gain = many["tokens_per_s"]["median"] / rate
        targets.append(_target("tokens/s, 16 clients / 1 client", gain, 5.0, at_least=True))
        if one["gaps_s"] and many["gaps_s"]:
            p95 = many["gaps_s"]["p95"]
            ratio = p95 / one["gaps_s"]["median"]
            targets.append(_target("p95 between events at 16 clients / median at 1 client", ratio, 3.0))
            # If tokens share events, this ratio depends more on the sharing than on the speed of the model.
            targets.append(_target("p95 between events at 16 clients / time per token at 1 client", p95 * rate, 3.0))
    return targets + [_target(f"overhead at {load['clients']} clients", load["overhead"], 0.05) for load in loads]


def _target(name: str, value: float, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "met": value >= limit if at_least else value <= limit}
