"""Measure one program with one file in its own process: `python -m fledge.bench.cpu.worker job.json`.

torch is not imported here, so that a program without torch is not charged for it. The job: {"program", "checkpoint",
"width", "prompt", "tokens", "batch", "threads", "logits"}. `batch` has one row per text with its first tokens. `logits`
is an .npz file to write.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fledge.bench.cpu.programs import PROGRAMS, BatchProgram, Logits, decode_greedily
from fledge.bench.measurement import JobResult, run_worker
from fledge.core.machine import peak_memory

WARMUP_TOKENS = 4
SHORT_PROMPT = 16  # tokens, for the time to the first token


def measure(job: dict[str, Any]) -> JobResult:
    """Load, prefill a short prompt, warm up with the full prompt, then time prefill, decoding and a batch."""
    program, times = PROGRAMS[job["program"]](), [time.perf_counter()]
    program.load_library(job["threads"])
    times.append(time.perf_counter())
    program.load(job["checkpoint"], job["width"])
    times.append(time.perf_counter())
    program.prefill(job["prompt"][:SHORT_PROMPT]).argmax()
    times.append(time.perf_counter())
    logits = program.prefill(job["prompt"])
    first = int(logits.argmax())
    decode_greedily(program, logits, WARMUP_TOKENS)
    started = time.perf_counter()
    logits = program.prefill(job["prompt"])
    prefill_s = time.perf_counter() - started
    saved = {"prompt": _copy(logits)}
    started = time.perf_counter()
    decode_greedily(program, logits, job["tokens"])
    result = {
        "import_s": times[1] - times[0],
        "load_s": times[2] - times[1],
        "first_token_s": times[3] - times[1],
        "prefill_s": prefill_s,
        "decode_s": time.perf_counter() - started,
        "peak_bytes": peak_memory(),
        **{name: method() for name in ("matrix_bytes", "build") if (method := getattr(program, name, None))},
    }
    assert int(saved["prompt"].argmax()) == first, "the same prompt gave two results"
    if len(job["batch"]) > 1 and isinstance(program, BatchProgram):
        saved["batch"], result["batch_s"] = _time_batch(program, job["batch"], job["tokens"])
        result["batch_peak_bytes"] = peak_memory()
    np.savez(job["logits"], **saved)
    return result


def _time_batch(program: BatchProgram, texts: Sequence[Sequence[int]], steps: int) -> tuple[Any, float]:
    """The logits after the first tokens of all texts, and the seconds of `steps` more steps.

    The logits after the very first token are no measure of agreement. With an empty state the norm of a head keeps
    little of its output but a sign, which rounding can flip.
    """
    program.start_batch(len(texts))
    for tokens in zip(*texts, strict=True):
        logits = program.decode_batch(tokens)
    saved = _copy(logits)
    started = time.perf_counter()
    for _ in range(steps):
        logits = program.decode_batch(logits.argmax(-1).tolist())
    return saved, time.perf_counter() - started


def _copy(logits: Logits) -> Any:
    """A separate numpy array: the program may overwrite its own."""
    return np.array(logits, dtype=np.float32)


if __name__ == "__main__":
    run_worker(measure)
