"""The programs that can be measured, each behind the same three calls: load, read a prompt, read one token.

A subject imports its program in `load_library`, in a process of its own: the PyPI package `rwkv` reads environment
variables and changes torch's settings when it is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

STRATEGIES = {"fp32": "cpu fp32", "bf16": "cpu bf16"}


class Subject(Protocol):
    """A program under measurement. After `load`, `prompt` begins a text and `token` continues it."""

    def load_library(self) -> None:
        """Import it."""

    def load(self, checkpoint: str, dtype: str) -> None:
        """Make the model of a .pth ready; dtype: "fp32" or "bf16"."""

    def prompt(self, ids: Sequence[int]) -> Tensor:
        """Read a prompt from the beginning: the scores of the next token, (V,) float32."""

    def token(self, token: int) -> Tensor:
        """Read one more token: the scores of the one after it."""


class FledgeSubject:
    """This program, by the calls that its own engine makes."""

    def load_library(self) -> None:
        """Import it."""
        import fledge.checkpoint.assembly
        import fledge.engine.generation  # noqa: F401 - the two modules that the calls below use

    def load(self, checkpoint: str, dtype: str) -> None:
        """Weights of `dtype`, packed as `fledge.load` packs them; everything else float32."""
        import torch

        from fledge.checkpoint import load_model

        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self._model = load_model(checkpoint, dtype=kind, pack=True).model

    def prompt(self, ids: Sequence[int]) -> Tensor:
        """By pieces, as `LLM.stream` does."""
        from fledge.engine import prefill

        cursor = prefill(self._model, ids)
        self._state = cursor.state
        return cursor.logits

    def token(self, token: int) -> Tensor:
        """One step of the engine."""
        from fledge.engine.generation import forward

        cursor = forward(self._model, [token], self._state)
        self._state = cursor.state
        return cursor.logits


class RwkvSubject:
    """The package `rwkv` from PyPI, by its documented calls; it cuts a long prompt into pieces of 256 itself."""

    def load_library(self) -> None:
        """Import it."""
        import rwkv.model  # noqa: F401

    def load(self, checkpoint: str, dtype: str) -> None:
        """With its strategy "cpu fp32" or "cpu bf16"."""
        from rwkv.model import RWKV

        self._model: Any = RWKV(model=checkpoint, strategy=STRATEGIES[dtype], verbose=False)

    def prompt(self, ids: Sequence[int]) -> Tensor:
        """From its zero state."""
        logits, self._state = self._model.forward(list(ids), None)
        assert isinstance(logits, Tensor)
        return logits

    def token(self, token: int) -> Tensor:
        """Its path for a single token."""
        logits, self._state = self._model.forward([token], self._state)
        assert isinstance(logits, Tensor)
        return logits


SUBJECTS: dict[str, type[Subject]] = {"fledge": FledgeSubject, "rwkv": RwkvSubject}
