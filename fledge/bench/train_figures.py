"""What `fledge bench train` reports, computed from its measurements: rates, memory, shares of arithmetic, ratios.

Each process does several steps, of which the median counts; the Samples here are over processes.
Not here: measuring (train.py), counting operations (counting.py), printing and drawing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fledge.bench.harness import Sample

DATASHEETS = {  # part of a GPU's name -> operations a second at most, dense, as its maker states them
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "RTX 4090": {"bf16": 165e12, "fp32": 82.6e12},
}


@dataclass(frozen=True)
class Case:
    """One program with products in one dtype, on texts of one length."""

    program: str  # "finch" or "eagle", "transformer"; the RWKV in other forms: "chunked", "loop", "fla"
    dtype: str  # "fp32" or "bf16"
    length: int  # tokens of context
    rows: int  # texts in a step


@dataclass(frozen=True)
class Figures:
    """What one case reached: tokens a second, seconds of a step and of its parts, bytes."""

    rate: Sample
    forward: Sample
    backward: Sample
    update: Sample
    cpu: Sample  # seconds of all processors together, which a busy machine changes less than it changes the clock
    peak: Sample | None  # of all memory while training; on a CPU with what the process itself needs
    before: int | None  # bytes of the process before there was a model
    loss: float
    operations_per_s: float

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "tokens_per_s": self.rate.summary(),
            "forward_s": self.forward.summary(),
            "backward_s": self.backward.summary(),
            "update_s": self.update.summary(),
            "cpu_s": self.cpu.summary(),
            "peak_bytes": self.peak.summary() if self.peak else None,
            "before_bytes": self.before,
            "loss": self.loss,
            "operations_per_s": self.operations_per_s,
        }


def figures_of(case: Case, results: Sequence[dict[str, Any]], operations: int) -> Figures:
    """From what the processes printed; operations: for each token."""

    def medians(*keys: str) -> Sample:
        return Sample(tuple(statistics.median(map(sum, zip(*(r[key] for key in keys), strict=True))) for r in results))

    seconds = medians("forward_s", "backward_s", "update_s")
    rate = Sample(tuple(case.length * case.rows / value for value in seconds.values))
    peaks = [result["peak_bytes"] for result in results]
    return Figures(
        rate=rate,
        forward=medians("forward_s"),
        backward=medians("backward_s"),
        update=medians("update_s"),
        cpu=medians("cpu_s"),
        peak=None if None in peaks else Sample(tuple(float(peak) for peak in peaks)),
        before=results[0]["before_bytes"],
        loss=results[-1]["loss"],
        operations_per_s=operations * rate.median,
    )


@dataclass
class Group:
    """The programs that took turns: one dtype, one length. `product`: operations a second of torch's product."""

    dtype: str
    length: int
    figures: dict[Case, Figures]
    product: Sample

    def of(self, program: str) -> Figures | None:
        """What a program reached here, if it took part."""
        return next((found for case, found in self.figures.items() if case.program == program), None)

    def targets(self, family: str) -> dict[str, float]:
        """Ratios of medians: of rates (above 1 is better for the RWKV), of time and memory (below 1 is).

        Rates are by the clock. On a machine that does other things the processors' time is what can be relied on.
        """
        mine, found = self.of(family), dict[str, float]()
        for other in ("transformer", "chunked", "loop", "fla"):
            theirs = self.of(other)
            if mine is None or theirs is None:
                continue
            found[f"rate_to_{other}"] = mine.rate.median / theirs.rate.median
            if other != "loop":  # whose step has fewer tokens
                found[f"cpu_time_of_{other}"] = mine.cpu.median / theirs.cpu.median
            if mine.peak and theirs.peak and other != "loop":
                found[f"memory_of_{other}"] = mine.peak.median / theirs.peak.median
        return found

    def record(self, family: str, gpu: str) -> dict[str, Any]:
        """As JSON."""
        return {
            "dtype": self.dtype,
            "length": self.length,
            "product_operations_per_s": self.product.summary(),
            "programs": {
                case.program: {
                    "rows": case.rows,
                    **found.record(),
                    "share_of_product": found.operations_per_s / self.product.median,
                    "model_flop_utilisation": utilisation(found.operations_per_s, gpu, self.dtype),
                }
                for case, found in self.figures.items()
            },
            "targets": self.targets(family),
        }


@dataclass
class KernelGroup:
    """The recurrence alone: seconds forward and backward of each backend, for one batch of texts."""

    shape: tuple[int, int, int, int]  # B, T, H, N
    seconds: dict[str, Sample] = field(default_factory=dict)

    @property
    def gains(self) -> dict[str, float]:
        """How many times as fast as the loop in torch each other form is."""
        loop = self.seconds["reference"].median
        return {backend: loop / found.median for backend, found in self.seconds.items() if backend != "reference"}

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "shape": list(self.shape),
            "seconds": {backend: sample.summary() for backend, sample in self.seconds.items()},
            "times_the_loop": self.gains,
        }


def utilisation(operations_per_s: float, gpu: str, dtype: str) -> float | None:
    """Model FLOP utilisation: the share of what the GPU's maker states; None on a CPU and for other GPUs."""
    limit = next((limits[dtype] for name, limits in DATASHEETS.items() if name in gpu), None)
    return None if limit is None else operations_per_s / limit
