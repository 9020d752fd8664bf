"""How measured numbers are shown, and what makes them doubtful; for every command below `fledge bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fledge.cli.terminal import note

if TYPE_CHECKING:
    from fledge.bench.harness import Sample

STEADY = 0.25  # (max - min) / median of a rate on a machine that does nothing else


def rate(sample: Sample | None) -> str:
    """The median, and half the distance of the extremes."""
    if sample is None:
        return ""
    spread = f" ±{sample.spread / 2:.0%}" if len(sample.values) > 1 else ""
    return f"{sample.median:,.1f}{spread}"


def mebibytes(sample: Sample | None) -> str:
    """An amount of memory; some platforms do not tell."""
    return f"{sample.median / 2**20:,.0f} MiB" if sample else "unknown"


def note_worth(notes: Sequence[str], machine: Mapping[str, Any], repeats: int, samples: Sequence[Sample] = ()) -> None:
    """Say on standard error what was left out, and why these figures should not be relied on, if so.

    samples: rates that should be steady.
    """
    for text in notes:
        note(f"note: {text}")
    load, cores = machine["load_average"], machine["usable_cores"]
    if load is not None and load[0] > cores / 2:
        note(f"note: the machine was busy when this began (load {load[0]} on {cores} cores); measure again")
    unsteady = sum(sample.spread > STEADY for sample in samples)
    if unsteady:
        note(f"note: {unsteady} of {len(samples)} rates vary by more than {STEADY:.0%}; was the machine busy?")
    if repeats < 3:
        note("note: fewer than 3 repeats tell nothing about the spread")
