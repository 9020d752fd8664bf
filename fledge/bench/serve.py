"""The server from outside: many clients, long documents asked about again, and thousands of states held.

The server is a process of its own, and so is every client. Not here: what a client or the engine alone does
(serve_worker.py), the arithmetic (serve_figures.py).
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fledge.bench.cpu_files import random_files
from fledge.bench.environment import machine_facts
from fledge.bench.harness import PACKAGE_PARENT, Report, in_fresh_process
from fledge.bench.serve_figures import load_figures, targets
from fledge.bench.serve_worker import resident
from fledge.core.errors import FledgeError, UsageError
from fledge.engine.loading import load

WORKER = "fledge.bench.serve_worker"
ADDRESS = re.compile(r" at http://127\.0\.0\.1:(\d+) ")
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
    repeats: int = 3  # of every load
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
    notes: tuple[str, ...] = ("llama-cpp-python's server is left out: it is not measured yet",)
    loads: list[dict[str, Any]] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)
    shelf: dict[str, Any] = field(default_factory=dict)

    def record(self, command: str) -> dict[str, Any]:
        """The whole result as plain JSON."""
        settings = asdict(self.spec)
        settings["folder"] = None  # a path tells about a machine's owner
        found = {"benchmark": "serve", "command": command, "machine": self.machine, "model": self.model}
        measured = {"loads": self.loads, "documents": self.documents, "shelf": self.shelf}
        return {**found, "settings": settings, "notes": list(self.notes), **measured, "targets": self.targets}

    @property
    def targets(self) -> list[dict[str, Any]]:
        """Those of which both sides were measured."""
        return targets(self.loads, self.documents, self.shelf)


def run(spec: Spec, report: Report = lambda *_: None, finished: Callable[[Outcome], None] = lambda _: None) -> Outcome:
    """Measure. Raises FledgeError where a process fails."""
    outcome = Outcome(spec, machine_facts())
    with tempfile.TemporaryDirectory(prefix="fledge-bench-", dir=spec.folder) as folder:
        model, dtype = spec.model, None
        if spec.shape:
            files = random_files(spec.shape, "finch", 65536, Path(folder), ("pth",))
            model, dtype = str(files.paths["pth"]), "bfloat16"
        llm = load(model, dtype=dtype)
        outcome.model, words, end = llm.name, llm.tokenizer.encode(WORDS), llm.tokenizer.eos_id
        del llm
        measuring = Measuring(outcome, report, model, dtype, Path(folder))
        measuring.ids = _Ids(words, end)
        with measuring.server("first") as (port, _):
            for clients in spec.clients:
                outcome.loads.append(measuring.load(port, clients))
                finished(outcome)
            for tokens in spec.documents:
                outcome.documents.append(measuring.document(port, tokens))
                finished(outcome)
        if spec.states:
            outcome.shelf = measuring.shelf()
            finished(outcome)
    return outcome


class _Ids:
    """Prompts of plain words, always the same: a model answers those with text, a token for nearly every event."""

    def __init__(self, words: list[int], end: int) -> None:
        self._words, self.end = words, end

    def of(self, count: int, seed: int) -> list[int]:
        """Some of them."""
        draw = random.Random(seed)
        return [draw.choice(self._words) for _ in range(count - 1)] + self._words[-1:]


class Measuring:
    """The processes, one after the other."""

    ids: _Ids

    def __init__(self, outcome: Outcome, report: Report, model: str | None, dtype: str | None, folder: Path) -> None:
        self._spec, self._report, self._done = outcome.spec, report, 0
        self._model, self._dtype, self._folder = model, dtype, folder
        spec = outcome.spec
        self._total = 2 * spec.repeats * len(spec.clients) + 5 * len(spec.documents) + 2 * bool(spec.states)

    @contextmanager
    def server(self, name: str) -> Iterator[tuple[int, int]]:
        """A server with a folder of its own; its port and its process id."""
        command = [sys.executable, "-m", "fledge", "serve", "--port", "0", "--folder", str(self._folder / name)]
        command += ["--model", self._model] if self._model else []
        command += ["--dtype", self._dtype] if self._dtype else []
        log = self._folder / f"{name}.log"  # a pipe that nobody empties would stop the server
        with open(log, "wb") as errors:
            process = subprocess.Popen(command, cwd=PACKAGE_PARENT, stdout=errors, stderr=errors)
        try:
            yield _port(process, log), process.pid
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def load(self, port: int, clients: int) -> dict[str, Any]:
        """The same requests through the server and by the engine alone, in turn."""
        count = max(self._spec.clients)  # for every number of clients the same requests: one asks them one by one
        bodies = [self._body(self.ids.of(self._spec.prompt, seed), seed) for seed in range(count)]
        job = {"clients": clients, "bodies": bodies}
        self._run("load", {**job, "port": port, "bodies": bodies[:1], "clients": 1}, "")  # does not count
        served, alone = [], []
        for _ in range(self._spec.repeats):
            served.append(self._run("load", {**job, "port": port}, f"{clients} clients"))
            alone.append(self._run("engine", {**job, "model": self._model, "dtype": self._dtype}, f"engine, {clients}"))
        return load_figures(clients, count * self._spec.tokens, served, alone)

    def document(self, port: int, tokens: int) -> dict[str, Any]:
        """Seconds to the first token of a question: after reading all, with the cache, and by the state's handle."""
        text = self.ids.of(tokens, 1000 + tokens)
        questions = [self.ids.of(QUESTION, seed) for seed in range(4)]
        cold = self._ask(port, [self._body(text + questions[0], 0, tokens=1)], f"{tokens} tokens, cold")
        bodies = [self._body([*text, *question], 0, tokens=1, cache=True) for question in questions]
        warm = self._ask(port, bodies, f"{tokens} tokens, cached")
        alone = self._ask(port, [self._body(questions[0], 0, tokens=1)], "the question alone")
        words = "word " * tokens  # what is read by its text: about a token for each
        kept = self._ask(port, [{"text": words}], f"{tokens} tokens, kept", "/v1/fledge/states")
        handle = json.loads(kept["last"])["id"]
        asked = [self._body(question, 0, tokens=1, state=handle) for question in questions[1:]]
        by_handle = self._ask(port, asked, f"{tokens} tokens, by handle")
        found = {"cold_s": cold["seconds"], "warm_s": warm["seconds"][1:], "handle_s": by_handle["seconds"]}
        return {"tokens": tokens, **found, "question_s": alone["seconds"]}

    def shelf(self) -> dict[str, Any]:
        """States on a shelf, then a server over it that goes on from random ones."""
        job = {"folder": str(self._folder / "held"), "states": self._spec.states, "resumed": self._spec.resumed}
        held = self._run("hold", {**job, "model": self._model, "dtype": self._dtype}, f"{self._spec.states} states")
        handles = held.pop("handles")
        with self.server("held") as (port, pid):
            question = self.ids.of(1, 0)
            self._ask(port, [self._body(question, 0, tokens=1)], "")  # does not count
            before = resident(pid)
            bodies = [self._body(question, 0, tokens=1, state=handle) for handle in handles]
            resumed = self._ask(port, bodies, "resuming")
            memory = {"server_before_bytes": before, "server_after_bytes": resident(pid)}
        return {"states": self._spec.states, **held, "resume_s": resumed["seconds"], **memory}

    def _body(
        self, prompt: list[int], seed: int, *, tokens: int = 0, cache: bool = False, **more: Any
    ) -> dict[str, Any]:
        options = {"ban": [self.ids.end] if self.ids.end >= 0 else [], "cache": cache, **more}
        tokens = tokens or self._spec.tokens
        return {"prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True, "fledge": options}

    def _ask(
        self, port: int, bodies: list[dict[str, Any]], label: str, path: str = "/v1/completions"
    ) -> dict[str, Any]:
        streamed = [{**body, "stream": True} if "prompt" in body else body for body in bodies]
        return self._run("ask", {"port": port, "bodies": streamed, "path": path}, label)

    def _run(self, kind: str, job: dict[str, Any], label: str) -> dict[str, Any]:
        if label:
            self._report(label, self._done, self._total)
            self._done = min(self._done + 1, self._total)
        return in_fresh_process(WORKER, {"kind": kind, **job}, {})


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """Once the server says where it listens."""
    for _ in range(1200):
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := ADDRESS.search(text):
            return int(found[1])
        if process.poll() is not None:
            raise FledgeError(f"the server did not start: {(text.strip().splitlines() or [''])[-1]:.300}")
        time.sleep(0.1)
    raise FledgeError("the server did not start within two minutes")
