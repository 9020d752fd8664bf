"""The plot of `fledge bench serve`: tokens per second and the time between events, by number of clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fledge.bench.plot_renderer import BLUE, GRAY, GREEN, ORANGE, PURPLE, Panel, Plot, Series, describe_machine


def plot_serve(record: Mapping[str, Any]) -> Plot:
    """Return the plot of a record."""
    loads = {load["clients"]: load for load in record["loads"]}
    prefixes = {"server": "", "engine alone": "engine_", **dict.fromkeys(record.get("peers", {}), "peer_")}
    rates = []
    for (label, prefix), color in zip(prefixes.items(), (ORANGE, BLUE, GRAY), strict=False):
        summaries = {clients: load.get(f"{prefix}tokens_per_s") for clients, load in loads.items()}
        points = {clients: summary for clients, summary in summaries.items() if summary}
        rates += [Series(label, color, points)] if points else []
    gaps = []
    for key, color in (("median", GREEN), ("p95", PURPLE)):
        values = {clients: 1e3 * load["gaps_s"][key] for clients, load in loads.items() if load["gaps_s"]}
        points = {clients: dict.fromkeys(("median", "min", "max"), value) for clients, value in values.items()}
        gaps += [Series(f"time between events, {key}", color, points)] if points else []
    panels = [Panel(rates, "tokens/s", "clients"), *([Panel(gaps, "ms between events", "clients")] if gaps else [])]
    return Plot([panels], f"{record['model']}. {describe_machine(record)}", (5.5, 3.2), label_all_points=True)
