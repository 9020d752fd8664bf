"""A model whose calls wait at a gate, so that a test controls the order of events."""

from __future__ import annotations

import threading
from typing import Any

from fakes import FakeModel
from live_server import CUE, TOKENIZER
from torch import Tensor

from fledge.engine.llm.llm import LLM
from fledge.models.state import State


class GatedModel(FakeModel):
    """Generates " hello there". Every call waits until `gate` is set."""

    def __init__(self) -> None:
        super().__init__([TOKENIZER.encode(" hello there")], CUE, TOKENIZER.vocab_size)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()  # set when a call has reached the gate

    def forward(self, idx: Tensor, state: State | None = None, **options: Any) -> tuple[Tensor, State]:
        self.waiting.set()
        assert self.gate.wait(timeout=30)
        return super().forward(idx, state, **options)

    def llm(self) -> LLM:
        """The model with its tokenizer."""
        return LLM(self, TOKENIZER, "gated")
