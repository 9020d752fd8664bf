"""Format metrics for the tables of `fledge bench`, and warn about metrics that are not reliable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fledge.cli.terminal import escape_controls, print_note

MAX_SPREAD = 0.25  # (max - min) / median of a rate on an idle machine

Summary = Mapping[str, Any]


def format_rate(summary: Summary | None, unit: float = 1.0) -> str:
    """Return the median and half the distance of the extremes."""
    if summary is None:
        return ""
    spread = f" ±{summary['spread'] / 2:.0%}" if len(summary["values"]) > 1 else ""
    return f"{summary['median'] / unit:,.1f}{spread}"


def format_memory(summary: Summary | None) -> str:
    """Return an amount of memory. Some platforms do not report it."""
    return f"{summary['median'] / 2**20:,.0f} MiB" if summary else "unknown"


def print_failures(rows: Mapping[str, Mapping[str, Any]], key: str = "error") -> None:
    """Print the error of each row of a baseline that crashed."""
    for name, row in rows.items():
        if key in row:
            print(escape_controls(f"{name}  failed: {row[key]}"))


def print_notes(record: Mapping[str, Any], rates: Sequence[Summary | None] = ()) -> None:
    """Print to standard error what was left out or failed, and why the metrics may not be reliable.

    rates: those that should be stable.
    """
    for text in record["notes"]:
        print_note(f"note: {text}")
    machine = record["machine"]
    load, cores = machine["load_average"], machine["usable_cores"]
    if load is not None and load[0] > cores / 2:
        print_note(f"note: the machine was busy at the start (load {load[0]} on {cores} cores); measure again")
    measured = [rate for rate in rates if rate]
    unstable = sum(rate["spread"] > MAX_SPREAD for rate in measured)
    if unstable:
        print_note(
            f"note: {unstable} of {len(measured)} rates vary by more than {MAX_SPREAD:.0%}; was the machine busy?"
        )
    if record["settings"]["repeats"] < 3:
        print_note("note: the spread of fewer than 3 repeats means nothing")
