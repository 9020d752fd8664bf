"""One measurement in a process of its own: `python -m fledge.bench.worker job.json`, result on the last line printed.

So load time and peak memory are those of one program and one dtype, and nothing that ran before is still warm.
The job: {"subject", "checkpoint", "dtype", "prompt", "tokens", "threads", "logits"}; `logits` is a file to write.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fledge.bench.harness import peak_memory
from fledge.bench.subjects import SUBJECTS, greedy

WARMUP_TOKENS = 4


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up once with the whole prompt, then time the prompt and the tokens after it. Seconds and bytes."""
    threads, subject = job["threads"], SUBJECTS[job["subject"]]()
    began = time.perf_counter()
    subject.load_library(threads)
    imported = time.perf_counter()
    subject.load(job["checkpoint"], job["dtype"])
    loaded = time.perf_counter()
    logits = subject.prompt(job["prompt"])
    first = int(logits.argmax())
    answered = time.perf_counter()
    greedy(subject, logits, WARMUP_TOKENS)

    start = time.perf_counter()
    logits = subject.prompt(job["prompt"])
    prefilled = time.perf_counter()
    after_prompt = logits.detach().clone()
    ids = greedy(subject, logits, job["tokens"])
    ended = time.perf_counter()
    assert ids[0] == first, "the same prompt gave two results"
    torch.save(after_prompt.float(), job["logits"])
    return {
        "import_s": imported - began,
        "load_s": loaded - imported,
        "first_token_s": answered - imported,
        "prefill_s": prefilled - start,
        "decode_s": ended - prefilled,
        "peak_bytes": peak_memory(),
        "threads": torch.get_num_threads(),
        "ids": ids,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
