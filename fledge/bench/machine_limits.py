"""The limits of this machine: the most bytes it reads and operations it does per second with a number of threads.

`python -m fledge.bench.machine_limits job.json` measures each limit once. Reading: the native library reads every byte
of a large buffer. Arithmetic: the native library multiplies registers, in each format that its matrix products use, and
torch multiplies two large matrices. Each limit is the best of several tries, because a disturbed try says nothing
about the maximum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fledge.bench.measurement import JobResult, run_worker, summarize, summarize_key, time_calls
from fledge.kernels.native_ops import KINDS, follow_torch_threads, functions, instruction_set
from fledge.native.library import why_missing

READ_BYTES = 512 << 20  # many times the largest cache
MATRIX = 2048  # rows and columns of torch's product
SECONDS = 0.15  # the shortest try with registers
TRIES = 3

ARITHMETIC = {"fp32": "float32", "bf16": "bfloat16", "int8": "int16", "int4": "int16"}
"""Weight format -> format of the multiplications. Quantized weights are multiplied as pairs of 16-bit integers."""


def summarize_limits(results: Sequence[JobResult]) -> dict[str, Any]:
    """Return the limits for the record, from the results of several workers."""

    def summaries(key: str) -> dict[str, Any]:
        return {name: summarize([result[key][name] for result in results]) for name in results[0][key]}

    return {
        "instruction_set": results[0]["instruction_set"],
        "read_bytes_per_s": summarize_key(results, "read"),  # None without the native library
        "register_operations_per_s": summaries("registers"),  # empty without the native library
        "torch_product_operations_per_s": summaries("products"),
    }


def read_limit(limits: Mapping[str, Any]) -> float | None:
    """Return the most bytes of weights per second, from a record."""
    summary = limits["read_bytes_per_s"]
    return summary["median"] if summary else None


def operations_limit(limits: Mapping[str, Any], width: str) -> float | None:
    """Return the most operations per second with weights of `width`: the better of both measurements."""
    name = ARITHMETIC[width]
    measured = (limits["register_operations_per_s"], limits["torch_product_operations_per_s"])
    return max((summaries[name]["median"] for summaries in measured if name in summaries), default=None)


def measure(job: Mapping[str, Any]) -> JobResult:
    """Measure each limit once. The job: {"threads"}, and for tests "read_bytes", "matrix" and "seconds"."""
    torch.set_num_threads(job["threads"])
    native = why_missing() is None
    if native:
        follow_torch_threads()
    seconds, size = job.get("seconds", SECONDS), job.get("matrix", MATRIX)
    return {
        "read": _read_rate(job.get("read_bytes", READ_BYTES)) if native else None,
        "registers": {name: _register_rate(code, seconds) for name, code in KINDS.items()} if native else {},
        "products": {name: product_rate(getattr(torch, name), size) for name in ("float32", "bfloat16")},
        "instruction_set": instruction_set() if native else None,
    }


def _read_rate(nbytes: int) -> float:
    buffer = torch.ones(nbytes, dtype=torch.uint8)  # written, so that every page exists
    return nbytes / _shortest(lambda: functions().fledge_measure_read(buffer.data_ptr(), nbytes, 1))


def _register_rate(kind: int, seconds: float) -> float:
    """Double the number of iterations until a try takes long enough, then return the best rate."""
    iterations, elapsed, operations = 1 << 12, 0.0, 0.0
    while elapsed < seconds:
        iterations *= 2
        started = time.perf_counter()
        operations = functions().fledge_measure_compute(iterations, kind)
        elapsed = time.perf_counter() - started
    return operations / min(elapsed, _shortest(lambda: functions().fledge_measure_compute(iterations, kind)))


def product_rate(dtype: torch.dtype, size: int, device: torch.device | str = "cpu") -> float:
    """Return the operations per second of torch's product of two square matrices."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))

    def call() -> None:
        torch.mm(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)

    with torch.inference_mode():
        return 2 * size**3 / _shortest(call)


def _shortest(call: Callable[[], object]) -> float:
    return min(time_calls(call, repeats=TRIES))


if __name__ == "__main__":
    run_worker(measure)
