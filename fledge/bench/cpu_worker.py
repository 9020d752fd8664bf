"""One program with one file in a process of its own: `python -m fledge.bench.cpu_worker job.json`.

The result is the last line printed. Nothing here imports torch, so that a program that does without is not charged
for it. The job: {"subject", "checkpoint", "width", "prompt", "tokens", "batch", "threads", "logits"}; `batch` has one
row for each text continued at once, its first tokens; `logits` is an .npz to write.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fledge.bench.harness import peak_memory
from fledge.bench.subjects import SUBJECTS, BatchSubject, Scores, Subject, greedy

WARMUP_TOKENS = 4
SHORT_PROMPT = 16  # tokens that are read for the time to the first token


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load, answer a short prompt, warm up with the whole one, then time it, the tokens after it and a batch.

    Seconds and bytes.
    """
    threads, subject = job["threads"], SUBJECTS[job["subject"]]()
    began = time.perf_counter()
    subject.load_library(threads)
    imported = time.perf_counter()
    subject.load(job["checkpoint"], job["width"])
    loaded = time.perf_counter()
    subject.prompt(job["prompt"][:SHORT_PROMPT]).argmax()
    answered = time.perf_counter()
    scores = subject.prompt(job["prompt"])
    first = int(scores.argmax())
    greedy(subject, scores, WARMUP_TOKENS)
    kept, times = _one_text(subject, job["prompt"], job["tokens"])
    assert int(kept["prompt"].argmax()) == first, "the same prompt gave two results"
    result = {
        "import_s": imported - began,
        "load_s": loaded - imported,
        "first_token_s": answered - imported,
        **times,
        "peak_bytes": peak_memory(),
        "matrix_bytes": _told(subject, "matrix_bytes"),
        "build": _told(subject, "build"),
    }
    if len(job["batch"]) > 1 and isinstance(subject, BatchSubject):
        kept["batch"], result["batch_s"] = _many_texts(subject, job["batch"], job["tokens"])
        result["batch_peak_bytes"] = peak_memory()
    np.savez(job["logits"], **kept)
    return result


def _one_text(subject: Subject, prompt: Sequence[int], tokens: int) -> tuple[dict[str, Any], dict[str, float]]:
    """The scores after the prompt, and how long the prompt and `tokens` tokens took."""
    began = time.perf_counter()
    scores = subject.prompt(prompt)
    read = time.perf_counter()
    kept = _copy(scores)
    start = time.perf_counter()
    greedy(subject, scores, tokens)
    return {"prompt": kept}, {"prefill_s": read - began, "decode_s": time.perf_counter() - start}


def _many_texts(subject: BatchSubject, texts: Sequence[Sequence[int]], steps: int) -> tuple[Any, float]:
    """The scores after the first tokens of all texts, and how long `steps` more of each took.

    Several first tokens, because the very first is no measure of agreement: with an empty state the norm of a head
    leaves little of its output but a sign, which rounding can turn.
    """
    subject.begin_batch(len(texts))
    for step in zip(*texts, strict=True):
        scores = subject.batch(step)
    kept = _copy(scores)
    began = time.perf_counter()
    for _ in range(steps):
        scores = subject.batch(scores.argmax(-1).tolist())
    return kept, time.perf_counter() - began


def _copy(scores: Scores) -> Any:
    """As a numpy array of its own: the program may write over what it gave."""
    return np.array(scores, dtype=np.float32)


def _told(subject: Subject, name: str) -> Any:
    """What a subject says of itself, where it can."""
    method = getattr(subject, name, None)
    return None if method is None else method()


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
