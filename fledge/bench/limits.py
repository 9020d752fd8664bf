"""What this machine can do at most: bytes read and operations done in a second, with so many threads.

`python -m fledge.bench.limits job.json` measures once in a process of its own; the result is the last line printed.
Reading: a large buffer through the native library, which touches every byte. Arithmetic: products of registers by the
native library, with each of the kinds that its matrix products use, and torch's product of two large matrices as a
second view. A limit is the best of several tries, since a disturbed try says nothing about what could be.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fledge.bench.harness import Sample
from fledge.kernels.native_ops import KINDS, follow_torch_threads, functions, instruction_set
from fledge.native.library import why_missing

READ_BYTES = 512 << 20  # many times the largest cache
MATRIX = 2048  # rows and columns of torch's product
SECONDS = 0.15  # a try with registers takes at least so long
TRIES = 3

ARITHMETIC = {"fp32": "float32", "bf16": "bfloat16", "int8": "int16", "int4": "int16"}
"""Width of the weights -> what their products are computed in; quantised ones in pairs of 16-bit integers."""


@dataclass(frozen=True)
class Limits:
    """The machine's limits, measured several times: bytes or operations a second."""

    read: Sample | None  # None without the native library
    registers: dict[str, Sample]  # kind, as in KINDS; empty without the native library
    products: dict[str, Sample]  # dtype: torch's own product
    instruction_set: str | None

    @classmethod
    def of(cls, results: list[dict[str, Any]]) -> Limits:
        """From what the processes printed."""

        def samples(key: str) -> dict[str, Sample]:
            return {name: Sample(tuple(result[key][name] for result in results)) for name in results[0][key]}

        read = None if results[0]["read"] is None else Sample(tuple(result["read"] for result in results))
        return cls(read, samples("registers"), samples("products"), results[0]["instruction_set"])

    def bytes_per_s(self) -> float | None:
        """How fast weights can be read at most."""
        return self.read.median if self.read else None

    def operations_per_s(self, width: str) -> float | None:
        """How fast weights of `width` can be multiplied at most: the better of the two views."""
        kind = ARITHMETIC[width]
        views = [found[kind].median for found in (self.registers, self.products) if kind in found]
        return max(views) if views else None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "instruction_set": self.instruction_set,
            "read_bytes_per_s": self.read.summary() if self.read else None,
            "register_operations_per_s": {name: sample.summary() for name, sample in self.registers.items()},
            "torch_product_operations_per_s": {name: sample.summary() for name, sample in self.products.items()},
        }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Once each. The job: {"threads"}, and for small machines and tests "read_bytes", "matrix" and "seconds"."""
    torch.set_num_threads(job["threads"])
    native = why_missing() is None
    if native:
        follow_torch_threads()
    seconds, size = job.get("seconds", SECONDS), job.get("matrix", MATRIX)
    return {
        "read": _reading(job.get("read_bytes", READ_BYTES)) if native else None,
        "registers": {name: _registers(code, seconds) for name, code in KINDS.items()} if native else {},
        "products": {"float32": product(torch.float32, size), "bfloat16": product(torch.bfloat16, size)},
        "instruction_set": instruction_set() if native else None,
    }


def _reading(nbytes: int) -> float:
    buffer = torch.ones(nbytes, dtype=torch.uint8)  # written, so that every page is there
    return nbytes / _shortest(lambda: functions().fledge_measure_read(buffer.data_ptr(), nbytes, 1))


def _registers(kind: int, seconds: float) -> float:
    """Twice as many turns until a try takes long enough; then the best rate."""
    turns, taken, operations = 1 << 12, 0.0, 0.0
    while taken < seconds:
        turns *= 2
        began = time.perf_counter()
        operations = functions().fledge_measure_compute(turns, kind)
        taken = time.perf_counter() - began
    return operations / min(taken, _shortest(lambda: functions().fledge_measure_compute(turns, kind)))


def product(dtype: torch.dtype, size: int, device: torch.device | str = "cpu") -> float:
    """Operations a second of torch's product of two matrices of `size` rows and columns."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))

    def call() -> None:
        torch.mm(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)

    with torch.inference_mode():
        return 2 * size**3 / _shortest(call)


def _shortest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    call()
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
