"""The server benchmark: concurrent clients, repeated questions on long documents, and thousands of stored states.

The server and every client run in their own processes.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from fledge.bench.measurement import JobResult
from fledge.bench.serve.metrics import compute_targets, load_metrics
from fledge.bench.serve.servers import (
    BASELINE,
    ServedModel,
    baseline_server,
    end_token_ids,
    fledge_server,
    missing_baseline,
    prepare_model,
)
from fledge.bench.suite import Benchmark, CaseRuns, Suite
from fledge.core.errors import FledgeError, UsageError
from fledge.core.machine import package_version, resident_memory
from fledge.engine.llm.loading import load
from fledge.tokenizer import Tokenizer

WORKER = "fledge.bench.serve.worker"
QUESTION_TOKENS = 16
WORDS = "Once upon a time there was a little girl who went to the park with her dog and her mom"
Body = dict[str, Any]  # of a request


@dataclass(frozen=True)
class ServeBenchmark(Benchmark):
    """Settings of the server benchmark."""

    kind: ClassVar[str] = "serve"

    model: str | None = None  # None: the bundled model
    shape: str | None = None  # of a random Finch, instead of a model
    clients: tuple[int, ...] = (1, 4, 16, 32)
    tokens: int = 128  # per response
    prompt: int = 32  # tokens
    documents: tuple[int, ...] = (2048, 8192, 32768)  # tokens
    states: int = 10_000
    resumed: int = 100
    repeats: int = 3  # of each load, and of prefilling a document
    peer: bool = True  # llama-cpp-python's server, if it is installed
    folder: str | None = None  # parent of the folder of the states

    def __post_init__(self) -> None:
        self.require_at_least(1, "tokens", "prompt", "resumed", "repeats")
        if not self.clients or min(self.clients) < 1:
            raise UsageError("clients must be numbers of at least 1")
        if self.states < 0 or min(self.documents, default=1) < 1:
            raise UsageError("states and documents cannot be negative")
        if self.model and self.shape:
            raise UsageError("pass either --model or --shape")

    def settings(self) -> dict[str, Any]:
        """Return the settings. A path may identify a person, so the folder is left out."""
        return {**super().settings(), "folder": None}

    def measure(self, suite: Suite) -> None:
        """Measure the loads and the documents, then the states without any other server running."""
        record = suite.record
        with tempfile.TemporaryDirectory(prefix="fledge-bench-", dir=self.folder) as name, ExitStack() as servers:
            folder = Path(name)
            missing = missing_baseline() if self.peer else "disabled"
            model = prepare_model(self.model, self.shape, folder, baseline=not missing)
            llm = load(model.source, dtype=model.dtype)
            record |= {"model": llm.name, "loads": [], "documents": [], "state_store": {}, "targets": []}
            prompts = PromptTexts(llm.tokenizer, end_token_ids(model.gguf) if model.gguf else ())
            del llm
            ports = {"fledge": servers.enter_context(fledge_server(model, folder / "first"))[0]}
            if model.gguf:
                try:
                    ports[BASELINE] = servers.enter_context(baseline_server(model.gguf, folder))
                    record["peers"] = {BASELINE: package_version(BASELINE)}
                except FledgeError as error:
                    missing = str(error)
            if BASELINE not in ports:
                record["notes"].append(f"{BASELINE}'s server is left out: {missing or model.missing_gguf}")
            run = ServeRun(self, suite, model, prompts, ports)
            for clients in self.clients:
                record["loads"].append(run.measure_load(clients))
                _save(suite)
            for tokens in self.documents:
                record["documents"].append(run.measure_document(tokens))
                _save(suite)
            servers.close()
            if self.states:
                record["state_store"] = run.measure_states(folder / "held")
                _save(suite)


def _save(suite: Suite) -> None:
    suite.record["targets"] = compute_targets(suite.record)
    suite.save()


class PromptTexts:
    """Fixed prompts of plain words. A model continues them with plain text, so nearly every event has one token.

    `end_ids` are the ids at which one of the programs ends a response. They are banned in all programs, so that every
    response has the number of tokens that the rates assume.
    """

    def __init__(self, tokenizer: Tokenizer, baseline_end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.end_ids = sorted({*baseline_end_ids, tokenizer.eos_id} - {-1})
        self._words = tokenizer.encode(WORDS)

    def ids(self, count: int, seed: int) -> list[int]:
        """Return `count` ids of random words."""
        rng = random.Random(seed)
        return [rng.choice(self._words) for _ in range(count - 1)] + self._words[-1:]

    def text(self, ids: list[int]) -> str:
        """Return the text for a server that does not accept ids. It encodes it to about as many tokens."""
        return self._tokenizer.decode(ids)

    def body(self, prompt: list[int], seed: int, tokens: int, **options: Any) -> Body:
        """Return a request without the prefix cache. options: more fields of "fledge"."""
        fledge = {"ban": self.end_ids, "cache": False, **options}
        return {"prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True, "fledge": fledge}

    def cached_body(self, prompt: list[int], seed: int, tokens: int) -> Body:
        """Return a request with the prefix cache."""
        return self.body(prompt, seed, tokens, cache=True)

    def baseline_body(self, prompt: list[int], seed: int, tokens: int) -> Body:
        """Return the same request for the baseline, with its other sampling options disabled."""
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "stream": True}
        bias = {str(end): -1e9 for end in self.end_ids}
        return {"prompt": self.text(prompt), "max_tokens": tokens, "seed": seed, **plain, "logit_bias": bias}


class ServeRun:
    """The client processes of one benchmark."""

    def __init__(
        self, settings: ServeBenchmark, suite: Suite, model: ServedModel, prompts: PromptTexts, ports: dict[str, int]
    ) -> None:
        self._settings, self._suite, self._model = settings, suite, model
        self._prompts, self._ports = prompts, ports
        self._weights = {"model": model.source, "dtype": model.dtype}
        programs = len(ports) + 2  # Fledge's server counts three times: without and with its cache, and the engine
        loads = len(settings.clients) * (programs * settings.repeats + programs - 1)
        suite.total_runs = loads + (programs + 2) * len(settings.documents) + 2 * bool(settings.states)

    def measure_load(self, clients: int) -> dict[str, Any]:
        """Run the same requests with the server, with its cache, with the engine alone and with the baseline, in turn.

        Every number of clients sends the same requests. A single client sends them one by one.
        """
        settings, prompts = self._settings, self._prompts
        count = max(settings.clients)
        ids = [prompts.ids(settings.prompt, seed) for seed in range(count)]
        fresh, cached, baseline = (
            [make_body(prompt, seed, settings.tokens) for seed, prompt in enumerate(ids)]
            for make_body in (prompts.body, prompts.cached_body, prompts.baseline_body)
        )
        port = self._ports["fledge"]
        jobs: dict[str, dict[str, Any]] = {
            "server": {"kind": "load", "port": port, "bodies": fresh},
            "cached": {"kind": "load", "port": port, "bodies": cached},
            "engine": {"kind": "engine", "bodies": fresh, **self._weights},
        }
        if BASELINE in self._ports:
            jobs[BASELINE] = {"kind": "load", "port": self._ports[BASELINE], "bodies": baseline}
        warmups = {name: {**job} for name, job in jobs.items() if name != "engine"}  # the engine warms up itself
        for name, job in warmups.items():  # the first batch of a size allocates memory
            job["bodies"] = job["bodies"] if name == "cached" else job["bodies"][:clients]
        failures = {name: run for name, run in self._run_jobs(warmups, clients, 1).items() if run.error}
        for name in failures:
            del jobs[name]
        runs = self._run_jobs(jobs, clients, settings.repeats) | failures
        return load_metrics(clients, count * settings.tokens, runs)

    def measure_document(self, tokens: int) -> dict[str, Any]:
        """Measure the seconds to the first token of a question on a document.

        cold: after prefilling the document. warm: with the prefix cache. handle: from the handle of a stored state.
        question: without a document. The baseline prefills the document with a question, then answers another one.
        """
        prompts, port = self._prompts, self._ports["fledge"]
        text = prompts.ids(tokens, 1000 + tokens)
        questions = [prompts.ids(QUESTION_TOKENS, seed) for seed in range(4)]
        cold = [prompts.body(text + questions[0], 0, 1)] * (self._settings.repeats - 1)
        cold.append(prompts.cached_body(text + questions[0], 0, 1))  # stores the states for the next questions
        warm = [prompts.cached_body(text + question, 0, 1) for question in questions[1:]]
        alone = [prompts.body(question, 0, 1) for question in questions[1:]]
        row: dict[str, Any] = {"tokens": tokens}
        row["cold_s"] = self._latency(port, cold, f"{tokens} tokens, cold")["seconds"]
        row["warm_s"] = self._latency(port, warm, f"{tokens} tokens, cached")["seconds"]
        question_s = self._latency(port, alone, "the question alone")["seconds"]
        stored = self._latency(port, [{"text": prompts.text(text)}], f"{tokens} tokens, stored", "/v1/fledge/states")
        handle = json.loads(stored["last"])["id"]
        by_handle = [prompts.body(question, 0, 1, state=handle) for question in questions[1:]]
        row["handle_s"] = self._latency(port, by_handle, f"{tokens} tokens, by handle")["seconds"]
        row["question_s"] = question_s
        if BASELINE in self._ports:
            bodies = [prompts.baseline_body(text + question, 0, 1) for question in questions[:2]]
            try:
                first, second = self._latency(self._ports[BASELINE], bodies, f"{tokens} tokens, {BASELINE}")["seconds"]
                row |= {"peer_cold_s": [first], "peer_again_s": [second]}
            except FledgeError as error:
                row["peer_error"] = str(error)
        return row

    def measure_states(self, folder: Path) -> dict[str, Any]:
        """Fill a state store, then resume from random states of it over HTTP."""
        settings = self._settings
        job = {"kind": "fill", "folder": str(folder), "states": settings.states, "resumed": settings.resumed}
        label = f"{settings.states} states"
        stored = self._suite.run(label, partial(self._suite.worker, WORKER, {**job, **self._weights}))
        handles = stored.pop("handles")
        with fledge_server(self._model, folder) as (port, pid):
            question = self._prompts.ids(1, 0)
            warmup = {"kind": "latency", "port": port, "bodies": [self._prompts.body(question, 0, 1)]}
            self._suite.worker(WORKER, warmup)
            before = resident_memory(pid)
            bodies = [self._prompts.body(question, 0, 1, state=handle) for handle in handles]
            seconds = self._latency(port, bodies, "resuming")["seconds"]
            memory = {"server_before_bytes": before, "server_after_bytes": resident_memory(pid)}
        return {"states": settings.states, **stored, "resume_s": seconds, **memory}

    def _run_jobs(self, jobs: dict[str, dict[str, Any]], clients: int, repeats: int) -> dict[str, CaseRuns]:
        jobs = {name: {**job, "clients": clients} for name, job in jobs.items()}
        return self._suite.interleave_jobs(WORKER, jobs, repeats, f"{clients} clients, {{}}", {BASELINE})

    def _latency(self, port: int, bodies: list[Body], label: str, path: str = "/v1/completions") -> JobResult:
        job = {"kind": "latency", "port": port, "bodies": bodies, "path": path}
        return self._suite.run(label, partial(self._suite.worker, WORKER, job))
