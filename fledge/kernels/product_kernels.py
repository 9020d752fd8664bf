"""The instruction set of the matrix products, chosen by measurement.

A feature flag does not say whether an instruction is fast: on some processors the products of bfloat16 run at half the
rate of float32 instructions. So each candidate is measured for a few milliseconds when a machine runs a native model
for the first time. The result is kept in `kernels.json` in the cache folder, for this processor and this version of the
library. `fledge doctor` shows the choice and can override it.

Integer products have the same bits with every instruction set. Products of bfloat16 weights add in another order, so
their results differ by rounding between machines with different choices, but never on one machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from fledge import __version__
from fledge.core.errors import UsageError
from fledge.core.files import get_cache_folder, read_json, write_json
from fledge.core.machine import cpu_features, cpu_model
from fledge.kernels.native_ops import (
    PackedMatrix,
    instruction_sets,
    matmul,
    pack,
    quantize_native,
    use_product_kernels,
)
from fledge.native.library import ABI

FILE = "kernels.json"
MEASURED_KINDS = ("bfloat16", "int16")
"""The kinds of activations whose products are measured. Those of float32 have one form only."""

NOT_CHOSEN = ("portable", "amx", "tile_model")
"""Never chosen by measurement: `portable` is for other processors, `tile_model` for tests. `amx` was only tested with
its scalar model so far, so it must be selected explicitly."""

MIN_GAIN = 1.15
"""The newest instruction set is replaced only by one that is faster by this factor, so noise changes no choice."""

# The measured product has one panel of the weight, so it runs on one thread, which is less noisy than several.
ROWS, INPUTS, OUTPUTS = 64, 2048, 64
ROUNDS = 15


@dataclass(frozen=True)
class ProductChoice:
    """The instruction set for the products of one kind of activations."""

    kind: str  # "bfloat16" or "int16"
    name: str
    rates: dict[str, float] = field(default_factory=dict)  # instruction set -> GFLOP/s of one thread
    is_override: bool = False

    @property
    def reason(self) -> str:
        """A sentence for `fledge doctor`."""
        measured = ", ".join(f"{name} {rate:.0f}" for name, rate in self.rates.items())
        start = "selected by `fledge doctor --kernel`" if self.is_override else "the fastest"
        return f"{start}; GFLOP/s of one thread: {measured}" if measured else start


@lru_cache(maxsize=1)
def apply_choices() -> tuple[ProductChoice, ...]:
    """Choose the kernels of this machine, once per process: from the cache file, or by measurement."""
    record = _read_record()
    if record is None:
        record = {"key": _machine_key(), "rates": {kind: measure(kind) for kind in MEASURED_KINDS}, "overrides": {}}
        _write_record(record)
    choices = tuple(_choose(kind, record) for kind in MEASURED_KINDS)
    for choice in choices:
        use_product_kernels(choice.kind, choice.name)
    return choices


def override(kind: str, name: str) -> None:
    """Use an instruction set for the products of one kind on this machine from now on; "auto": the fastest.

    "amx" is compared with its scalar model first. Raises UsageError for an unknown kind, an instruction set that this
    processor does not support, and matrix units that differ from their model.
    """
    if kind not in MEASURED_KINDS:
        raise UsageError(f"kernel {kind!r:.40} is unknown; choose {' or '.join(MEASURED_KINDS)}")
    supported = instruction_sets()
    if name != "auto" and name not in supported:
        raise UsageError(f"instruction set {name!r:.40} is not one of: auto, {', '.join(supported)}")
    if name == "amx" and not equals_model(kind, name):
        raise UsageError("the matrix units of this processor do not compute the same bits as their model; keep auto")
    apply_choices.cache_clear()
    apply_choices()
    record = _read_record()
    if record is None:
        raise UsageError(f"{get_cache_folder() / FILE} cannot be written, so the choice would be lost")
    record["overrides"].pop(kind, None)
    if name != "auto":
        record["overrides"][kind] = name
    write_json(get_cache_folder() / FILE, record)
    apply_choices.cache_clear()
    apply_choices()


def equals_model(kind: str, name: str) -> bool:
    """Whether products with an instruction set have the same bits as those with the scalar model of matrix units.

    Compares random matrices with moderate numbers, with the whole range of exponents, and with tiny numbers and zeros.
    """
    generator = torch.Generator().manual_seed(0)
    for low, high in ((-10, 10), (-60, 60), (-126, -50)):
        weight, x = (_random_matrix(rows, 96, low, high, generator) for rows in (128, 37))
        for format in ("bfloat16",) if kind == "bfloat16" else ("int8", "int4"):
            packed = _pack(weight if kind == "bfloat16" else weight / weight.abs().max(), format)
            results = []
            for kernels in (name, "tile_model"):
                use_product_kernels(kind, kernels)
                results.append(matmul(x, packed))
            use_product_kernels(kind, "")
            if not torch.equal(*results):
                return False
    return True


def _random_matrix(rows: int, columns: int, low: int, high: int, generator: torch.Generator) -> torch.Tensor:
    """Random numbers with binary exponents from `low` to `high`; one in 16 is zero."""
    exponents = torch.randint(low, high, (rows, columns), generator=generator)
    numbers = torch.randn(rows, columns, generator=generator) * torch.exp2(exponents.float())
    return numbers.masked_fill(torch.rand(rows, columns, generator=generator) < 1 / 16, 0.0)


def _pack(weight: torch.Tensor, format: str) -> PackedMatrix:
    if format == "bfloat16":
        return pack(weight, format)
    quantized = quantize_native(weight, format)
    assert quantized is not None
    return PackedMatrix.from_quantized(quantized[0])


def measure_again() -> None:
    """Measure the candidates again. Overrides are kept."""
    record = _read_record() or {"key": _machine_key(), "overrides": {}}
    _write_record({**record, "rates": {kind: measure(kind) for kind in MEASURED_KINDS}})
    apply_choices.cache_clear()
    apply_choices()


def measure(kind: str) -> dict[str, float]:
    """Measure the rate of a product with each candidate, in GFLOP/s of one thread, best instruction set first.

    The candidates take turns, and the shortest time of each counts, so other programs disturb the comparison little.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    x = torch.randn(ROWS, INPUTS, generator=generator)
    packed = _pack(weight, "bfloat16" if kind == "bfloat16" else "int8")
    times = {name: math.inf for name in instruction_sets() if name not in NOT_CHOSEN}
    for _ in range(ROUNDS):
        for name in times:
            use_product_kernels(kind, name)
            start = time.perf_counter()
            matmul(x, packed)
            times[name] = min(times[name], time.perf_counter() - start)
    use_product_kernels(kind, "")
    return {name: 2 * ROWS * INPUTS * OUTPUTS / seconds / 1e9 for name, seconds in times.items()}


def _choose(kind: str, record: dict[str, Any]) -> ProductChoice:
    rates: dict[str, float] = record["rates"][kind]
    if kind in record["overrides"]:
        return ProductChoice(kind, record["overrides"][kind], rates, is_override=True)
    default = instruction_sets()[0]
    fastest = max(rates, key=rates.__getitem__, default=default)
    gain = rates[fastest] / rates[default] if default in rates else 1.0
    return ProductChoice(kind, fastest if gain > MIN_GAIN else default, rates)


def _machine_key() -> str:
    """Identifies the processor and the library."""
    return json.dumps([cpu_model(), cpu_features(), instruction_sets(), __version__, ABI])


def _read_record() -> dict[str, Any] | None:
    """The cache file if it is valid and belongs to this machine, else None."""
    try:
        record = read_json(get_cache_folder() / FILE)
        if record["key"] != _machine_key():
            return None
        supported = set(instruction_sets())
        rates = {
            kind: {name: float(rate) for name, rate in record["rates"][kind].items() if name in supported}
            for kind in MEASURED_KINDS
        }
        overrides = {
            kind: name for kind, name in record["overrides"].items() if kind in MEASURED_KINDS and name in supported
        }
        return {"key": record["key"], "rates": rates, "overrides": overrides}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_record(record: dict[str, Any]) -> None:
    """Write the cache file. Without write access, every process measures again."""
    with contextlib.suppress(OSError):
        get_cache_folder().mkdir(parents=True, exist_ok=True)
        write_json(get_cache_folder() / FILE, record)
