"""The programs that `fledge bench cpu` measures, behind one interface: load, prefill a prompt, decode a token.

A program imports its library in `load_library`, in its own process: the PyPI package `rwkv` reads environment variables
and changes torch's settings on import, and the process of llama.cpp should not import torch. Nothing heavy is therefore
imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from fledge.bench.cpu.llama_cpp import LlamaCppProgram

RWKV_STRATEGIES = {"fp32": "cpu fp32", "bf16": "cpu bf16"}

Logits = Any
"""Float32 logits of the next token: a torch tensor or a numpy array, valid until the next call."""


class CpuProgram(Protocol):
    """A program under measurement. After `load`, `prefill` starts a text and `decode` continues it."""

    def load_library(self, threads: int) -> None:
        """Import the library and limit it to `threads` threads."""

    def load(self, checkpoint: str, width: str) -> None:
        """Load a model. width: "fp32" or "bf16", or "int8" or "int4" for a quantized file."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Start a text with a prompt and return the logits after it, (V,)."""

    def decode(self, token: int) -> Logits:
        """Append one token and return the logits after it, (V,)."""


@runtime_checkable
class BatchProgram(Protocol):
    """A program that decodes a batch of texts in one call."""

    def start_batch(self, size: int) -> None:
        """Start `size` empty texts."""

    def decode_batch(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each text and return the logits after them, (size, V)."""


def decode_greedily(program: CpuProgram, logits: Logits, count: int) -> None:
    """Decode `count` tokens, the most probable one each time."""
    for _ in range(count):
        logits = program.decode(int(logits.argmax()))


class FledgeProgram:
    """Fledge, through the calls of its own engine."""

    def load_library(self, threads: int) -> None:
        """Import the modules that the calls below use."""
        import torch

        import fledge.checkpoint.model_loader
        import fledge.engine.generation  # noqa: F401 - imported for its cost

        torch.set_num_threads(threads)

    def load(self, checkpoint: str, width: str) -> None:
        """Load matrices of `width`, packed as in `fledge.load`. Everything else is float32."""
        import torch

        from fledge.checkpoint import load_model

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(width)  # None: the file is quantized
        self._model = load_model(checkpoint, dtype=dtype, pack=True).model

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Prefill in chunks, as `LLM.stream` does."""
        from fledge.engine import prefill

        cursor = prefill(self._model, ids)
        self._state = cursor.state
        return cursor.logits

    def decode(self, token: int) -> Logits:
        """One step of the engine. The logits are an array, as in the sampler; see `decode_batch`."""
        from fledge.engine.generation import forward

        cursor = forward(self._model, [token], self._state)
        self._state = cursor.state
        return cursor.logits.numpy()

    def start_batch(self, size: int) -> None:
        """The first step creates the states."""
        self._states: Any = None

    def decode_batch(self, tokens: Sequence[int]) -> Logits:
        """One step of all texts.

        The logits are an array. torch's argmax would use all its threads, which then spin on the cores that the next
        step needs.
        """
        import torch

        idx = torch.tensor([list(tokens)], dtype=torch.long).T
        with torch.no_grad():
            logits, self._states = self._model(idx, self._states, last=True)
        return logits[:, -1].numpy()

    def matrix_bytes(self) -> int | None:
        """Return the bytes of weights that are read per token, or None if the model does not report it."""
        matrices = getattr(self._model, "matrices", None)
        return None if matrices is None else sum(matrix.nbytes for matrix in matrices.values())


class RwkvProgram:
    """The package `rwkv` from PyPI, through its documented calls. It splits a long prompt into chunks of 256 itself."""

    def load_library(self, threads: int) -> None:
        """Import the package."""
        import rwkv.model
        import torch

        torch.set_num_threads(threads)
        self._module: Any = rwkv.model

    def load(self, checkpoint: str, width: str) -> None:
        """Use the strategy "cpu fp32" or "cpu bf16"."""
        self._model: Any = self._module.RWKV(model=checkpoint, strategy=RWKV_STRATEGIES[width], verbose=False)

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Start from its zero state."""
        logits, self._state = self._model.forward(list(ids), None)
        return logits.float()

    def decode(self, token: int) -> Logits:
        """Use its path for a single token."""
        logits, self._state = self._model.forward([token], self._state)
        return logits.float()


PROGRAMS: dict[str, type[CpuProgram]] = {"fledge": FledgeProgram, "rwkv": RwkvProgram, "llama.cpp": LlamaCppProgram}
