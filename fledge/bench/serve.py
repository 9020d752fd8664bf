"""The server from outside: many clients, long documents asked about again, and thousands of states held.

A server is a process of its own, and so is every client. Not here: how a server is started (serve_process.py), what a
client or the engine alone does (serve_worker.py), the arithmetic (serve_figures.py).
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fledge.bench.environment import machine_facts, package_version
from fledge.bench.harness import Report, Sample, in_fresh_process, interleaved
from fledge.bench.serve_figures import load_figures, targets
from fledge.bench.serve_process import PEER, Model, ends_of, fledge_server, peer_server, prepared, why_no_peer
from fledge.bench.serve_worker import resident
from fledge.core.errors import UsageError
from fledge.engine.llm.loading import load
from fledge.tokenizer import Tokenizer

WORKER = "fledge.bench.serve_worker"
QUESTION = 16  # tokens
WORDS = "Once upon a time there was a little girl who went to the park with her dog and her mom"


@dataclass(frozen=True)
class Spec:
    """What to measure."""

    model: str | None = None  # None: the bundled one
    shape: str | None = None  # a random Finch in its place
    clients: tuple[int, ...] = (1, 4, 16, 32)
    tokens: int = 128  # of an answer
    prompt: int = 32  # tokens
    documents: tuple[int, ...] = (2048, 8192, 32768)  # tokens
    states: int = 10_000
    resumed: int = 100
    repeats: int = 3  # of every load, and of reading a document
    peer: bool = True  # llama-cpp-python's server, where it is installed
    folder: str | None = None  # where the states' folder is made

    def __post_init__(self) -> None:
        for name in ("tokens", "prompt", "resumed", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.clients or min(self.clients) < 1:
            raise UsageError("clients must be numbers of at least 1")
        if self.states < 0 or min(self.documents, default=1) < 1:
            raise UsageError("states and documents cannot be negative")
        if self.model and self.shape:
            raise UsageError("give either --model or --shape")


@dataclass
class Outcome:
    """What has been measured so far."""

    spec: Spec
    machine: dict[str, Any]
    model: str = ""
    peer: str | None = None  # its version
    notes: tuple[str, ...] = ()
    loads: list[dict[str, Any]] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)
    shelf: dict[str, Any] = field(default_factory=dict)

    def record(self, command: str) -> dict[str, Any]:
        """The whole result as plain JSON."""
        settings = asdict(self.spec)
        settings["folder"] = None  # a path tells about a machine's owner
        found = {"benchmark": "serve", "command": command, "machine": self.machine, "model": self.model}
        found["peers"] = {PEER: self.peer} if self.peer else {}
        measured = {"loads": self.loads, "documents": self.documents, "shelf": self.shelf}
        return {**found, "settings": settings, "notes": list(self.notes), **measured, "targets": self.targets}

    @property
    def targets(self) -> list[dict[str, Any]]:
        """Those of which both sides were measured."""
        return targets(self.loads, self.documents, self.shelf)

    @property
    def rates(self) -> list[Sample]:
        """Of every program and number of clients."""
        keys = ("tokens_per_s", "cached_tokens_per_s", "engine_tokens_per_s", "peer_tokens_per_s")
        return [Sample(tuple(load[key]["values"])) for load in self.loads for key in keys if load.get(key)]


Finished = Callable[[Outcome], None]
"""Called after each part, so that what was measured is not lost to the last one."""


def run(spec: Spec, report: Report = lambda *_: None, finished: Finished = lambda _: None) -> Outcome:
    """Measure. Raises FledgeError where a process fails."""
    outcome = Outcome(spec, machine_facts())
    with tempfile.TemporaryDirectory(prefix="fledge-bench-", dir=spec.folder) as folder, ExitStack() as servers:
        missing = why_no_peer() if spec.peer else "it is not asked for"
        model = prepared(spec.model, spec.shape, Path(folder), peer=not missing)
        llm = load(model.source, dtype=model.dtype)
        outcome.model, texts = llm.name, Texts(llm.tokenizer, ends_of(model.gguf) if model.gguf else ())
        del llm
        measuring = Measuring(outcome, report, model, texts, Path(folder))
        ports = {"fledge": servers.enter_context(fledge_server(model, Path(folder) / "first"))[0]}
        if model.gguf:
            ports[PEER], outcome.peer = (
                servers.enter_context(peer_server(model.gguf, Path(folder))),
                package_version(PEER),
            )
        else:
            outcome.notes += (f"{PEER}'s server is left out: {missing or model.why_no_gguf}",)
        for clients in spec.clients:
            outcome.loads.append(measuring.load(ports, clients))
            finished(outcome)
        for tokens in spec.documents:
            outcome.documents.append(measuring.document(ports, tokens))
            finished(outcome)
        servers.close()  # what follows is measured with nothing beside it
        if spec.states:
            outcome.shelf = measuring.shelf()
            finished(outcome)
    return outcome


class Texts:
    """Prompts of plain words, always the same: a model answers those with text, a token for nearly every event.

    `ends` are the ids at which one of the programs ends an answer. All are forbidden to all of them, so that an answer
    has as many tokens as the rates say.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[int] = ()) -> None:
        """ends: of the peer."""
        self._tokenizer = tokenizer
        self.ends = sorted({*ends, tokenizer.eos_id} - {-1})
        self._words = tokenizer.encode(WORDS)

    def ids(self, count: int, seed: int) -> list[int]:
        """Some of them."""
        draw = random.Random(seed)
        return [draw.choice(self._words) for _ in range(count - 1)] + self._words[-1:]

    def text(self, ids: list[int]) -> str:
        """For a server that reads no ids; it finds about as many."""
        return self._tokenizer.decode(ids)


class Measuring:
    """The client processes, one after the other."""

    def __init__(self, outcome: Outcome, report: Report, model: Model, texts: Texts, folder: Path) -> None:
        self._spec, self._report, self._done = outcome.spec, report, 0
        self._model, self._texts, self._folder = model, texts, folder
        spec = outcome.spec
        programs = 4 if model.gguf else 3
        self._total = programs * spec.repeats * len(spec.clients) + 5 * len(spec.documents) + 2 * bool(spec.states)

    def load(self, ports: dict[str, int], clients: int) -> dict[str, Any]:
        """The same requests through the server, with the cache too, by the engine alone, and by the peer, in turn."""
        count = max(self._spec.clients)  # for every number of clients the same requests: one asks them one by one
        prompts = [self._texts.ids(self._spec.prompt, seed) for seed in range(count)]
        fresh, cached, peers = (
            [make(ids, seed, self._spec.tokens) for seed, ids in enumerate(prompts)]
            for make in (self._body, self._cached, self._peer_body)
        )
        served = {"clients": clients, "port": ports["fledge"]}
        jobs = {
            "server": ("load", {**served, "bodies": fresh}),
            "cached": ("load", {**served, "bodies": cached}),
            "engine": ("engine", {"clients": clients, "bodies": fresh, **self._weights}),
        }
        if PEER in ports:
            jobs[PEER] = ("load", {"clients": clients, "port": ports[PEER], "bodies": peers})
        for name, (kind, job) in jobs.items():  # does not count: the first of a size finds memory that is not there yet
            if kind == "load":
                self._run("load", {**job, "bodies": job["bodies"] if name == "cached" else job["bodies"][:clients]})
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
        for _, name in interleaved(list(jobs), self._spec.repeats):
            found[name].append(self._run(*jobs[name], label=f"{clients} clients, {name}"))
        return load_figures(clients, count * self._spec.tokens, found)

    def document(self, ports: dict[str, int], tokens: int) -> dict[str, Any]:
        """Seconds to the first token of a question: after reading all, with the cache, and by the state's handle."""
        port, text = ports["fledge"], self._texts.ids(tokens, 1000 + tokens)
        questions = [self._texts.ids(QUESTION, seed) for seed in range(4)]
        cold = [self._body(text + questions[0], 0, 1)] * (self._spec.repeats - 1)
        cold.append(self._cached(text + questions[0], 0, 1))  # leaves the states that the next questions find
        read = self._ask(port, cold, f"{tokens} tokens, cold")
        again = self._ask(
            port, [self._cached(text + words, 0, 1) for words in questions[1:]], f"{tokens} tokens, cached"
        )
        alone = self._ask(port, [self._body(words, 0, 1) for words in questions[1:]], "the question alone")
        kept = self._ask(port, [{"text": self._texts.text(text)}], f"{tokens} tokens, kept", "/v1/fledge/states")
        handle = json.loads(kept["last"])["id"]
        asked = [self._body(words, 0, 1, state=handle) for words in questions[1:]]
        by_handle = self._ask(port, asked, f"{tokens} tokens, by handle")
        seconds = {"cold": read, "warm": again, "handle": by_handle, "question": alone}
        if PEER in ports:  # twice: the document, then another question on it
            bodies = [self._peer_body(text + words, 0, 1) for words in questions[:2]]
            peer = self._ask(ports[PEER], bodies, f"{tokens} tokens, {PEER}")["seconds"]
            seconds |= {"peer_cold": {"seconds": peer[:1]}, "peer_again": {"seconds": peer[1:]}}
        return {"tokens": tokens, **{f"{name}_s": found["seconds"] for name, found in seconds.items()}}

    def shelf(self) -> dict[str, Any]:
        """States on a shelf, then a server over it that goes on from random ones."""
        folder = self._folder / "held"
        job = {"folder": str(folder), "states": self._spec.states, "resumed": self._spec.resumed, **self._weights}
        held = self._run("hold", job, f"{self._spec.states} states")
        handles = held.pop("handles")
        with fledge_server(self._model, folder) as (port, pid):
            question = self._texts.ids(1, 0)
            self._ask(port, [self._body(question, 0, 1)])  # does not count
            before = resident(pid)
            bodies = [self._body(question, 0, 1, state=handle) for handle in handles]
            resumed = self._ask(port, bodies, "resuming")
            memory = {"server_before_bytes": before, "server_after_bytes": resident(pid)}
        return {"states": self._spec.states, **held, "resume_s": resumed["seconds"], **memory}

    @property
    def _weights(self) -> dict[str, Any]:
        return {"model": self._model.source, "dtype": self._model.dtype}

    def _body(self, prompt: list[int], seed: int, tokens: int, **more: Any) -> dict[str, Any]:
        options = {"ban": self._texts.ends, "cache": False, **more}
        return {"prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True, "fledge": options}

    def _cached(self, prompt: list[int], seed: int, tokens: int) -> dict[str, Any]:
        return self._body(prompt, seed, tokens, cache=True)

    def _peer_body(self, prompt: list[int], seed: int, tokens: int) -> dict[str, Any]:
        """The same request in the peer's terms: its other knobs are set to do nothing."""
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "stream": True}
        banned = {str(end): -1e9 for end in self._texts.ends}
        return {"prompt": self._texts.text(prompt), "max_tokens": tokens, "seed": seed, **plain, "logit_bias": banned}

    def _ask(
        self, port: int, bodies: list[dict[str, Any]], label: str = "", path: str = "/v1/completions"
    ) -> dict[str, Any]:
        return self._run("ask", {"port": port, "bodies": bodies, "path": path}, label)

    def _run(self, kind: str, job: dict[str, Any], label: str = "") -> dict[str, Any]:
        if label:
            self._report(label, self._done, self._total)
            self._done = min(self._done + 1, self._total)
        return in_fresh_process(WORKER, {"kind": kind, **job}, {})
