"""llama.cpp as a program under measurement, through the low-level calls of the PyPI package `llama-cpp-python`.

Its class `Llama` makes these same calls with some Python around them, and has no way to continue several texts at once.
The settings are those that `Llama` uses for 512 tokens a batch; threads are given, and nothing goes to a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

BATCH = 512  # tokens of a prompt in one call, as in this program's own engine
CONTEXT = 1 << 20  # tokens; the state of a recurrent model has one size, so a large number costs nothing
ERROR = 4  # of ggml's log levels


class LlamaSubject:
    """A GGUF file in llama.cpp."""

    def load_library(self, threads: int) -> None:
        """Import it and keep it quiet, but for errors."""
        import llama_cpp.llama_cpp as api
        import numpy as np

        def log(level: int, text: bytes, _data: object) -> None:
            if level == ERROR:
                sys.stderr.write(text.decode("utf-8", errors="replace"))

        self._api: Any = api
        self._numpy = np
        self._threads = threads
        self._log = api.llama_log_callback(log)  # kept, because C has its address only
        api.llama_log_set(self._log, None)
        api.llama_backend_init()

    def load(self, checkpoint: str, width: str) -> None:
        """The file decides about the width; mapped, and repacked where llama.cpp thinks that faster."""
        settings = self._api.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model: Any = self._api.llama_model_load_from_file(checkpoint.encode(), settings)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the file")
        self._vocab_size = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        self._batch: Any = self._api.llama_batch_init(BATCH, 0, 1)
        self._context: Any = self._new_context(1)

    def prompt(self, ids: Sequence[int]) -> Any:
        """By batches, from an empty memory."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._read = 0
        for start in range(0, len(ids), BATCH):
            scores = self._continue(ids[start : start + BATCH])
        return scores

    def token(self, token: int) -> Any:
        """The same call with one token."""
        return self._continue([token])

    def begin_batch(self, count: int) -> None:
        """Another context, with a place for each text; the old one is given up."""
        if count > BATCH:
            raise RuntimeError(f"at most {BATCH} texts at once, not {count}")
        self._api.llama_free(self._context)
        self._context = self._new_context(count)
        self._read = 0

    def batch(self, tokens: Sequence[int]) -> Any:
        """One token of each text in one call, with the scores after all of them."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.logits[at] = token, self._read, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, at
        self._read += 1
        return self._decode(len(tokens))

    def build(self) -> str:
        """What it was compiled for, in its own words."""
        info: bytes = self._api.llama_print_system_info()
        return info.decode("utf-8", errors="replace").strip(" |\n")

    def _new_context(self, sequences: int) -> Any:
        settings = self._api.llama_context_default_params()
        settings.n_ctx = CONTEXT
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.no_perf = True
        context = self._api.llama_init_from_model(self._model, settings)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {sequences} texts")
        return context

    def _continue(self, ids: Sequence[int]) -> Any:
        """The next tokens of the one text, with the scores after the last."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.logits[at] = token, self._read + at, 0
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        batch.logits[len(ids) - 1] = 1
        self._read += len(ids)
        return self._decode(1)[0]

    def _decode(self, rows: int) -> Any:
        failed = self._api.llama_decode(self._context, self._batch)
        if failed:
            raise RuntimeError(f"llama_decode answers {failed}")
        pointer = self._api.llama_get_logits(self._context)
        return self._numpy.ctypeslib.as_array(pointer, shape=(rows, self._vocab_size))
