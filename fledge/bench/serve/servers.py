"""The servers that `fledge bench serve` measures: `fledge serve` and llama-cpp-python's, with the same weights."""

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
from fledge.bench.cpu.model_files import write_random_files
from fledge.bench.measurement import PACKAGE_PARENT
from fledge.checkpoint.formats.gguf.header import read_header
from fledge.core.device import count_usable_cores
from fledge.core.errors import FledgeError
from fledge.engine.llm.loading import locate_checkpoint

BASELINE = "llama-cpp-python"
VOCABULARY = 65536  # of random models
ADDRESS = re.compile(r" (?:at|on) http://127\.0\.0\.1:(\d+) ")
STATE_STORE_MB = 1 << 20  # no state is evicted
END_TOKENS = ("eos", "eot", "eom")  # end of text, of turn, of message
BASELINE_CONTEXT = 1 << 16  # tokens
START_TIMEOUT, STOP_TIMEOUT = 120, 40  # seconds


@dataclass(frozen=True)
class ServedModel:
    """The model that the servers load."""

    source: str | None  # None: the bundled model
    dtype: str | None = None
    gguf: Path | None = None  # the same weights for the baseline
    missing_gguf: str = ""  # the reason why there is no GGUF


def prepare_model(model: str | None, shape: str | None, folder: Path, *, baseline: bool) -> ServedModel:
    """Write a random model to a folder, or take a model as it is. For the baseline, also write a bfloat16 GGUF.

    Raises UsageError for an invalid shape, CheckpointError as loading does.
    """
    kinds = ("pth", "bf16") if baseline else ("pth",)
    if shape:
        paths = write_random_files(shape, "finch", VOCABULARY, folder, kinds).paths
        return ServedModel(str(paths["pth"]), "bfloat16", paths.get("bf16"))
    if not baseline:
        return ServedModel(model)
    source, gguf = locate_checkpoint(model), folder / "peer.gguf"
    contents = checkpoint.read(source)
    if contents.quantized:
        return ServedModel(model, missing_gguf="the model is quantized in Fledge's own format; pass --shape")
    has_vocabulary = contents.tokenizer_spec is not None or contents.config.vocab_size == VOCABULARY
    if contents.config.version != "6.0" or not has_vocabulary:
        return ServedModel(model, missing_gguf="only an RWKV-6 with its vocabulary can be converted to GGUF")
    checkpoint.convert(source, gguf, matrix_type="bf16")
    return ServedModel(model, "bfloat16", gguf)


def end_token_ids(gguf: Path) -> set[int]:
    """Return the ids at which the baseline ends a response."""
    values = read_header(gguf).values
    return {int(values[key]) for name in END_TOKENS if (key := f"tokenizer.ggml.{name}_token_id") in values}


def missing_baseline() -> str:
    """Return how to install the baseline's server, or "" if it is installed."""
    modules = ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings")
    missing = any(importlib.util.find_spec(name) is None for name in modules)
    return f'`pip install "{BASELINE}[server]"`' if missing else ""


@contextmanager
def fledge_server(model: ServedModel, folder: Path) -> Iterator[tuple[int, int]]:
    """Run a server with its own folder. Yields its port and its process id."""
    command = [sys.executable, "-m", "fledge", "serve", "--port", "0", "--folder", str(folder)]
    command += ["--state-storage", str(STATE_STORE_MB)]
    command += ["--model", model.source] if model.source else []
    command += ["--dtype", model.dtype] if model.dtype else []
    with _running(command, folder.with_suffix(".log")) as port_and_pid:
        yield port_and_pid


@contextmanager
def baseline_server(gguf: Path, folder: Path) -> Iterator[int]:
    """Run the baseline's server with as many threads as Fledge. Yields its port. It handles one request at a time."""
    threads = str(count_usable_cores())
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1", "--port", "0"]
    command += ["--interrupt_requests", "false", "--logits_all", "false", "--n_ctx", str(BASELINE_CONTEXT)]
    command += ["--verbose", "false", "--n_threads", threads, "--n_threads_batch", threads]
    with _running(command, folder / "peer.log") as (port, _):
        yield port


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[tuple[int, int]]:
    with open(log, "wb") as errors:  # a file: a full pipe would block the server
        process = subprocess.Popen(command, cwd=PACKAGE_PARENT, stdout=errors, stderr=errors)
    try:
        yield _wait_for_port(process, log), process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_port(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port in the server's log, once it listens."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8", errors="replace")
        if match := ADDRESS.search(text):
            return int(match[1])
        if process.poll() is not None:
            raise FledgeError(f"the server did not start: {(text.strip().splitlines() or [''])[-1]:.300}")
        time.sleep(0.1)
    raise FledgeError(f"the server did not start within {START_TIMEOUT} seconds")
