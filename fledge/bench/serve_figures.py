"""What follows from the times of `fledge bench serve`: rates, percentiles, and the targets met or missed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fledge.bench.harness import Sample

Facts = Mapping[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)]


def load_figures(clients: int, tokens: int, runs: Mapping[str, Sequence[Facts]]) -> dict[str, Any]:
    """One number of clients. Times of all repeats are taken together, rates stay apart.

    runs: "server", "engine", and where they were measured "cached" and the peer by its name.
    """
    names = {"server": "", "cached": "cached_", "engine": "engine_"}
    rates = {names.get(name, "peer_"): Sample(tuple(tokens / run["seconds"] for run in runs[name])) for name in runs}
    found: dict[str, Any] = {
        "clients": clients,
        **{f"{prefix}tokens_per_s": rate.summary() for prefix, rate in rates.items()},
        "overhead": 1 - rates[""].median / rates["engine_"].median,
        "client_cores": max(run["client_cores"] for run in runs["server"]),
        "tokens_per_event": statistics.median(
            tokens / (len(run["first_s"]) + len(run["gaps_s"])) for run in runs["server"]
        ),
    }
    for name, measured in runs.items():
        for key in () if name == "engine" else ("first_s", "gaps_s"):
            found[names.get(name, "peer_") + key] = _times([value for run in measured for value in run[key]])
    return found


def _times(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "p95": percentile(values, 0.95)} if values else None


def targets(loads: Sequence[Facts], documents: Sequence[Facts], shelf: Facts) -> list[dict[str, Any]]:
    """Name, figure, limit and whether it is met, of everything whose parts were measured."""
    by_clients, found = {load["clients"]: load for load in loads}, list[dict[str, Any]]()
    one, many = by_clients.get(1), by_clients.get(16)
    if one and many:
        gain = many["tokens_per_s"]["median"] / one["tokens_per_s"]["median"]
        found.append(_target("tokens/s of 16 clients to those of one", gain, 5.0, at_least=True))
        if one["gaps_s"] and many["gaps_s"]:
            ratio = many["gaps_s"]["p95"] / one["gaps_s"]["median"]
            found.append(_target("p95 between events at 16 clients to the median of one", ratio, 3.0))
            # Where several tokens share an event, this tells more of the sharing than of the model's pace.
            ratio = many["gaps_s"]["p95"] * one["tokens_per_s"]["median"]
            found.append(_target("p95 between events at 16 clients to the time of one client's token", ratio, 3.0))
    for load in loads:
        found.append(_target(f"overhead at {load['clients']} clients", load["overhead"], 0.05))
    for document in documents:
        if document["tokens"] == 32768:
            for name in ("warm_s", "handle_s"):
                extra = statistics.median(document[name]) - statistics.median(document["question_s"])
                found.append(_target(f"32k tokens, {name[:-2]}: s beyond the question", extra, 0.1))
    if shelf:
        found.append(_target("resume by HTTP, median s", statistics.median(shelf["resume_s"]), 0.02))
        for name, before, after in (
            ("filling", "before_bytes", "after_bytes"),
            ("resuming", "server_before_bytes", "server_after_bytes"),
        ):
            if shelf[before] and shelf[after]:
                found.append(_target(f"memory after {name} to before", shelf[after] / shelf[before], 1.1))
    return found


def _target(name: str, value: float, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "met": value >= limit if at_least else value <= limit}
