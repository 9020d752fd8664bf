"""What `fledge bench cpu` reports, computed from its measurements: rates, shares of the machine's limits, ratios.

    bytes a second       bytes of all matrices, read once for a token, x tokens a second written
    operations a second  2 x numbers in all matrices but the head, which a prompt needs once, x tokens a second read

Not here: measuring (cpu.py), printing and drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fledge.bench.agreement import Difference
from fledge.bench.harness import Sample
from fledge.bench.limits import Limits

LABELS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""Width -> the type of llama.cpp that is compared with it."""

BETTER_IF_SMALLER = ("load", "first_token", "peak", "batch_peak")


@dataclass(frozen=True)
class Case:
    """One program with weights of one width."""

    program: str  # "fledge", "llama.cpp", "rwkv" or "rwkv jit"
    width: str

    @property
    def subject(self) -> str:
        """The key of SUBJECTS."""
        return self.program.removesuffix(" jit")

    @property
    def name(self) -> str:
        """As it stands in tables and records, llama.cpp's with its own word for the width."""
        return f"{self.program} {LABELS[self.width] if self.program == 'llama.cpp' else self.width}"


@dataclass(frozen=True)
class Figures:
    """What one case reached: tokens a second, seconds, bytes."""

    prefill: Sample
    decode: Sample
    batch: Sample | None  # tokens of all texts together
    imports: Sample  # of the program, before anything is loaded
    load: Sample
    first_token: Sample  # from the beginning of loading, a short prompt included
    process: Sample  # from beginning to end, everything included
    peak: Sample | None  # with one text
    batch_peak: Sample | None
    matrix_bytes: int  # read for one token

    def record(self) -> dict[str, Any]:
        """As JSON."""

        def summary(sample: Sample | None) -> Any:
            return sample.summary() if sample else None

        return {
            "prefill_tokens_per_s": summary(self.prefill),
            "decode_tokens_per_s": summary(self.decode),
            "batch_tokens_per_s": summary(self.batch),
            "import_s": summary(self.imports),
            "load_s": summary(self.load),
            "first_token_s": summary(self.first_token),
            "process_s": summary(self.process),
            "peak_bytes": summary(self.peak),
            "batch_peak_bytes": summary(self.batch_peak),
            "matrix_bytes": self.matrix_bytes,
        }


def figures_of(results: Sequence[dict[str, Any]], settings: dict[str, int], matrix_bytes: int) -> Figures:
    """From what the processes printed; settings: "prompt", "tokens" and "batch"."""

    def sample(key: str) -> Sample | None:
        values = [result.get(key) for result in results]
        return None if None in values else Sample(tuple(float(value) for value in values if value is not None))

    def needed(key: str) -> Sample:
        found = sample(key)
        assert found is not None, key
        return found

    def rate(tokens: int, seconds: Sample) -> Sample:
        return Sample(tuple(tokens / value for value in seconds.values))

    batch = sample("batch_s")
    return Figures(
        prefill=rate(settings["prompt"], needed("prefill_s")),
        decode=rate(settings["tokens"], needed("decode_s")),
        batch=rate(settings["tokens"] * settings["batch"], batch) if batch else None,
        imports=needed("import_s"),
        load=needed("load_s"),
        first_token=needed("first_token_s"),
        process=needed("process_s"),
        peak=sample("peak_bytes"),
        batch_peak=sample("batch_peak_bytes"),
        matrix_bytes=matrix_bytes,
    )


@dataclass(frozen=True)
class Block:
    """Everything about one model."""

    model: dict[str, Any]  # name, sizes, "matrix_numbers", "head_numbers"
    batch: int
    limits: Limits
    figures: dict[Case, Figures]
    differences: dict[Case, dict[str, Difference]]  # to `reference`
    reference: Case

    @property
    def widths(self) -> list[str]:
        """Those of this program, in order."""
        return [case.width for case in self.figures if case.program == "fledge"]

    def bytes_per_s(self, case: Case) -> float:
        """Read of the weights while one text is written."""
        figures = self.figures[case]
        return figures.decode.median * figures.matrix_bytes

    def operations_per_s(self, case: Case) -> float:
        """Done with the weights while a prompt is read."""
        numbers = self.model["matrix_numbers"] - self.model["head_numbers"]
        return self.figures[case].prefill.median * 2 * numbers

    def share_of_reading(self, case: Case) -> float | None:
        """Of what this machine can read."""
        limit = self.limits.bytes_per_s()
        return limit and self.bytes_per_s(case) / limit

    def share_of_arithmetic(self, case: Case) -> float | None:
        """Of what this machine can multiply in the kind that this program uses for the width."""
        limit = self.limits.operations_per_s(case.width)
        return limit and self.operations_per_s(case) / limit

    def ceilings(self, case: Case) -> dict[str, float | None]:
        """Tokens a second that the machine's limits allow with the bytes of `case`: "prefill", "decode", "batch"."""
        reading, arithmetic = self.limits.bytes_per_s(), self.limits.operations_per_s(case.width)
        numbers, head = self.model["matrix_numbers"], self.model["head_numbers"]
        decode = reading and reading / self.figures[case].matrix_bytes
        bounds = [decode and self.batch * decode, arithmetic and arithmetic / (2 * numbers)]
        known = [bound for bound in bounds if bound is not None]
        return {
            "prefill": arithmetic and arithmetic / (2 * (numbers - head)),
            "decode": decode,
            "batch": min(known) if known else None,
        }

    def targets(self) -> dict[str, dict[str, Any]]:
        """Width -> this program's ratios to the others, its shares of the limits, and what a batch gains."""
        found: dict[str, dict[str, Any]] = {}
        for width in self.widths:
            ours = Case("fledge", width)
            figures = self.figures[ours]
            llama = [f for case, f in self.figures.items() if case.program == "llama.cpp" and case.width == width]
            rwkv = [f for case, f in self.figures.items() if case.subject == "rwkv"]
            found[width] = {
                "to_llama.cpp": ratios(figures, llama),
                "to_the_best_rwkv": ratios(figures, rwkv),
                "share_of_reading": self.share_of_reading(ours),
                "share_of_arithmetic": self.share_of_arithmetic(ours),
                "batch_gain": figures.batch.median / figures.decode.median if figures.batch else None,
            }
        return found

    def record(self) -> dict[str, Any]:
        """As JSON."""
        figures = {}
        for case, found in self.figures.items():
            figures[case.name] = {
                "program": case.program,
                "width": case.width,
                **found.record(),
                "decode_bytes_per_s": self.bytes_per_s(case),
                "share_of_reading": self.share_of_reading(case),
                "prefill_operations_per_s": self.operations_per_s(case),
                "share_of_arithmetic": self.share_of_arithmetic(case),
                "ceilings_tokens_per_s": self.ceilings(case),
            }
        return {
            "model": self.model,
            "limits": self.limits.record(),
            "figures": figures,
            "targets": self.targets(),
            "differences": {
                "reference": self.reference.name,
                **{
                    case.name: {what: difference.record() for what, difference in found.items()}
                    for case, found in self.differences.items()
                },
            },
        }


def ratios(ours: Figures, others: Sequence[Figures]) -> dict[str, float]:
    """Figure -> how many times better ours is than the best of the others, in each figure that both have.

    Where smaller is better (times, memory) the ratio is turned, so that above 1 is always better.
    """
    found = {}
    for name in ("prefill", "decode", "batch", *BETTER_IF_SMALLER):
        mine = getattr(ours, name)
        theirs = [sample.median for other in others if (sample := getattr(other, name)) is not None]
        if mine is None or not theirs:
            continue
        smaller = name in BETTER_IF_SMALLER
        found[name] = min(theirs) / mine.median if smaller else mine.median / max(theirs)
    return found
