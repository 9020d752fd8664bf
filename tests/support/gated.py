"""A model with calls that wait for a gate, so that a test controls the order of events."""

from __future__ import annotations

import threading
from typing import Any

from fakes import FakeModel
from running import CUE, TOKENIZER
from torch import Tensor

from fledge.engine.llm.llm import LLM
from fledge.models.state import State


class GatedModel(FakeModel):
    """Generates the replies of `fakes.FakeModel` once `gate` is open."""

    def __init__(self) -> None:
        super().__init__([TOKENIZER.encode(" hello there")], CUE, TOKENIZER.vocab_size)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()  # set when a call has reached the gate

    def forward(self, idx: Tensor, state: State | None = None, **more: Any) -> tuple[Tensor, State]:
        self.waiting.set()
        assert self.gate.wait(timeout=30)
        return super().forward(idx, state, **more)

    def llm(self) -> LLM:
        """It, with its tokenizer."""
        return LLM(self, TOKENIZER, "gated")
