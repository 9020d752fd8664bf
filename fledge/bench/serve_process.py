"""The servers that `fledge bench serve` measures: this one and that of llama-cpp-python, on the same weights.

Not here: what is asked of them (serve.py).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fledge import checkpoint
from fledge.bench.cpu_files import random_files
from fledge.bench.harness import PACKAGE_PARENT
from fledge.checkpoint.formats.gguf.header import read_header
from fledge.core.device import count_usable_cores
from fledge.core.errors import FledgeError
from fledge.engine.llm.loading import locate_checkpoint

PEER = "llama-cpp-python"
VOCABULARY = 65536  # of random models
ADDRESS = re.compile(r" (?:at|on) http://127\.0\.0\.1:(\d+) ")
SHELF = 1 << 20  # MB: as many states as are put there
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message
CONTEXT = 1 << 16  # tokens that the peer reads at most
STARTING, ENDING = 120, 40  # seconds


@dataclass(frozen=True)
class Model:
    """What the servers load."""

    source: str | None  # None: the bundled one
    dtype: str | None = None
    gguf: Path | None = None  # the same weights for the peer
    why_no_gguf: str = ""


def prepared(model: str | None, shape: str | None, folder: Path, *, peer: bool) -> Model:
    """A random model written to a folder, or a given one as it is; as bfloat16 GGUF beside it for the peer.

    Raises UsageError for a shape that cannot be, CheckpointError as loading does.
    """
    kinds = ("pth", "bf16") if peer else ("pth",)
    if shape:
        paths = random_files(shape, "finch", VOCABULARY, folder, kinds).paths
        return Model(str(paths["pth"]), "bfloat16", paths.get("bf16"))
    if not peer:
        return Model(model)
    source, gguf = locate_checkpoint(model), folder / "peer.gguf"
    found = checkpoint.read(source)
    if found.quantized:
        return Model(model, why_no_gguf="the model is quantised in a way of this program's own; give --shape")
    known = found.tokenizer_spec is not None or found.config.vocab_size == VOCABULARY
    if found.config.version != "6.0" or not known:
        return Model(model, why_no_gguf="only an RWKV-6 with its vocabulary can be written for it")
    checkpoint.convert(source, gguf, matrix_type="bf16")
    return Model(model, "bfloat16", gguf)


def ends_of(gguf: Path) -> set[int]:
    """The ids at which the peer ends an answer."""
    values = read_header(gguf).values
    return {int(values[key]) for name in ENDS if (key := f"tokenizer.ggml.{name}_token_id") in values}


def why_no_peer() -> str:
    """Empty where its server can run."""
    needed = ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings")
    missing = any(importlib.util.find_spec(name) is None for name in needed)
    return f'`pip install "{PEER}[server]"`' if missing else ""


@contextmanager
def fledge_server(model: Model, folder: Path) -> Iterator[tuple[int, int]]:
    """A server with a folder of its own; its port and its process id."""
    command = [sys.executable, "-m", "fledge", "serve", "--port", "0", "--folder", str(folder), "--shelf", str(SHELF)]
    command += ["--model", model.source] if model.source else []
    command += ["--dtype", model.dtype] if model.dtype else []
    with _running(command, folder.with_suffix(".log")) as found:
        yield found


@contextmanager
def peer_server(gguf: Path, folder: Path) -> Iterator[int]:
    """The peer's, on as many threads as this one's; its port. It answers one request at a time, the others wait."""
    threads = str(count_usable_cores())
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1", "--port", "0"]
    command += ["--interrupt_requests", "false", "--logits_all", "false", "--n_ctx", str(CONTEXT), "--verbose", "false"]
    command += ["--n_threads", threads, "--n_threads_batch", threads]
    with _running(command, folder / "peer.log") as (port, _):
        yield port


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[tuple[int, int]]:
    with open(log, "wb") as errors:  # a pipe that nobody empties would stop the server
        process = subprocess.Popen(command, cwd=PACKAGE_PARENT, stdout=errors, stderr=errors)
    try:
        yield _port(process, log), process.pid
    finally:
        process.terminate()
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """Once the server says where it listens."""
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := ADDRESS.search(text):
            return int(found[1])
        if process.poll() is not None:
            raise FledgeError(f"the server did not start: {(text.strip().splitlines() or [''])[-1]:.300}")
        time.sleep(0.1)
    raise FledgeError(f"the server did not start within {STARTING} seconds")
