"""The programs that can be measured, each behind the same three calls: load, read a prompt, read one token.

A subject imports its program in `load_library`, in a process of its own: the PyPI package `rwkv` reads environment
variables and changes torch's settings when it is imported, and llama.cpp's process shall not pay for a torch that it
does not use. So nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from fledge.bench.llama import LlamaSubject

STRATEGIES = {"fp32": "cpu fp32", "bf16": "cpu bf16"}

Scores = Any
"""Of the next token, float32: a torch tensor or a numpy array, valid until the next call."""


class Subject(Protocol):
    """A program under measurement. After `load`, `prompt` begins a text and `token` continues it."""

    def load_library(self, threads: int) -> None:
        """Import it; from then on it uses so many threads."""

    def load(self, checkpoint: str, width: str) -> None:
        """Make the model of a file ready; width: "fp32" or "bf16", or "int8" or "int4" where the file is quantised."""

    def prompt(self, ids: Sequence[int]) -> Scores:
        """Read a prompt from the beginning: the scores of the next token, (V,)."""

    def token(self, token: int) -> Scores:
        """Read one more token: the scores of the one after it."""


@runtime_checkable
class BatchSubject(Protocol):
    """A program that can continue several texts in one call."""

    def begin_batch(self, count: int) -> None:
        """So many texts, of which nothing has been read."""

    def batch(self, tokens: Sequence[int]) -> Scores:
        """Read one token of each text: the scores of the ones after them, (count, V)."""


def greedy(subject: Subject, scores: Scores, count: int) -> list[int]:
    """`count` tokens, the most probable one each time, each read by the model."""
    ids = []
    for _ in range(count):
        ids.append(int(scores.argmax()))
        scores = subject.token(ids[-1])
    return ids


class FledgeSubject:
    """This program, by the calls that its own engine makes."""

    def load_library(self, threads: int) -> None:
        """Import it."""
        import torch

        import fledge.checkpoint.model_loader
        import fledge.engine.generation  # noqa: F401 - the two modules that the calls below use

        torch.set_num_threads(threads)

    def load(self, checkpoint: str, width: str) -> None:
        """Weights of `width`, packed as `fledge.load` packs them; everything else float32."""
        import torch

        from fledge.checkpoint import load_model

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(width)  # None: the file is quantised already
        self._model = load_model(checkpoint, dtype=dtype, pack=True).model

    def prompt(self, ids: Sequence[int]) -> Scores:
        """By pieces, as `LLM.stream` does."""
        from fledge.engine import prefill

        cursor = prefill(self._model, ids)
        self._state = cursor.state
        return cursor.logits

    def token(self, token: int) -> Scores:
        """One step of the engine. As an array, which its sampler works on as well: see `batch`."""
        from fledge.engine.generation import forward

        cursor = forward(self._model, [token], self._state)
        self._state = cursor.state
        return cursor.logits.numpy()

    def begin_batch(self, count: int) -> None:
        """The first step makes the states."""
        self._states: Any = None

    def batch(self, tokens: Sequence[int]) -> Scores:
        """One step for all.

        As an array: torch would look for the largest score with all its threads, and these wait for more such work in a
        loop, on the cores that the next step needs.
        """
        import torch

        idx = torch.tensor([list(tokens)], dtype=torch.long).T
        with torch.no_grad():
            logits, self._states = self._model(idx, self._states, last=True)
        return logits[:, -1].numpy()

    def matrix_bytes(self) -> int | None:
        """What is read of the weights for one token; None where the model does not tell."""
        matrices = getattr(self._model, "matrices", None)
        return None if matrices is None else sum(matrix.nbytes for matrix in matrices.values())


class RwkvSubject:
    """The package `rwkv` from PyPI, by its documented calls; it cuts a long prompt into pieces of 256 itself."""

    def load_library(self, threads: int) -> None:
        """Import it."""
        import rwkv.model
        import torch

        torch.set_num_threads(threads)
        self._module: Any = rwkv.model

    def load(self, checkpoint: str, width: str) -> None:
        """With its strategy "cpu fp32" or "cpu bf16"."""
        self._model: Any = self._module.RWKV(model=checkpoint, strategy=STRATEGIES[width], verbose=False)

    def prompt(self, ids: Sequence[int]) -> Scores:
        """From its zero state."""
        logits, self._state = self._model.forward(list(ids), None)
        return logits.float()

    def token(self, token: int) -> Scores:
        """Its path for a single token."""
        logits, self._state = self._model.forward([token], self._state)
        return logits.float()


SUBJECTS: dict[str, type[Subject]] = {"fledge": FledgeSubject, "rwkv": RwkvSubject, "llama.cpp": LlamaSubject}
