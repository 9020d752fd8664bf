"""llama.cpp as a program under measurement, through the low-level calls of the PyPI package `llama-cpp-python`.

Its class `Llama` makes the same calls with additional Python code, and cannot decode a batch of texts. The settings are
those of `Llama` with 512 tokens per batch. The number of threads is set, and nothing is offloaded to a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

BATCH_TOKENS = 512  # prompt tokens per call, as in Fledge's engine
CONTEXT = 1 << 20  # tokens. A large number costs nothing: the state of a recurrent model has a fixed size.
ERROR_LEVEL = 4  # in ggml's logs


class LlamaCppProgram:
    """A GGUF file in llama.cpp."""

    def load_library(self, threads: int) -> None:
        """Import the library and silence all log messages except errors."""
        import llama_cpp.llama_cpp as api
        import numpy as np

        def log(level: int, text: bytes, _data: object) -> None:
            if level == ERROR_LEVEL:
                sys.stderr.write(text.decode("utf-8", errors="replace"))

        self._api: Any = api
        self._numpy = np
        self._threads = threads
        self._log = api.llama_log_callback(log)  # kept alive: C holds only its address
        api.llama_log_set(self._log, None)
        api.llama_backend_init()

    def load(self, checkpoint: str, width: str) -> None:
        """Load a file, mapped, and repacked if llama.cpp expects a benefit. The file determines the width."""
        settings = self._api.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model: Any = self._api.llama_model_load_from_file(checkpoint.encode(), settings)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the file")
        self._vocab_size = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        self._batch: Any = self._api.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._context: Any = self._new_context(1)

    def prefill(self, ids: Sequence[int]) -> Any:
        """Prefill in batches, from an empty memory."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._position = 0
        for start in range(0, len(ids), BATCH_TOKENS):
            logits = self._append(ids[start : start + BATCH_TOKENS])
        return logits

    def decode(self, token: int) -> Any:
        """Make the same call with one token."""
        return self._append([token])

    def start_batch(self, size: int) -> None:
        """Replace the context by one with `size` sequences."""
        if size > BATCH_TOKENS:
            raise RuntimeError(f"the batch size is {size}; at most {BATCH_TOKENS}")
        self._api.llama_free(self._context)
        self._context = self._new_context(size)
        self._position = 0

    def decode_batch(self, tokens: Sequence[int]) -> Any:
        """Append one token to each text in one call."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row], batch.logits[row] = token, self._position, 1
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, row
        self._position += 1
        return self._run_batch(len(tokens))

    def build(self) -> str:
        """Return the features it was compiled for, as llama.cpp reports them."""
        info: bytes = self._api.llama_print_system_info()
        return info.decode("utf-8", errors="replace").strip(" |\n")

    def _new_context(self, sequences: int) -> Any:
        settings = self._api.llama_context_default_params()
        settings.n_ctx = CONTEXT
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.no_perf = True
        context = self._api.llama_init_from_model(self._model, settings)
        if not context:
            raise RuntimeError(f"llama.cpp cannot create a context for {sequences} sequences")
        return context

    def _append(self, ids: Sequence[int]) -> Any:
        """Append tokens to the single text; the logits after the last one."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for row, token in enumerate(ids):
            batch.token[row], batch.pos[row], batch.logits[row] = token, self._position + row, 0
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
        batch.logits[len(ids) - 1] = 1
        self._position += len(ids)
        return self._run_batch(1)[0]

    def _run_batch(self, rows: int) -> Any:
        code = self._api.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        pointer = self._api.llama_get_logits(self._context)
        return self._numpy.ctypeslib.as_array(pointer, shape=(rows, self._vocab_size))
