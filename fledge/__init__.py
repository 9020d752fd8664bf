"""Fledge runs, trains and evaluates RWKV-5 Eagle and RWKV-6 Finch language models.

    import fledge
    llm = fledge.load()
    print(llm.generate("Once upon a time").text)

This is the front door: the names below, each loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fledge.core.errors import FledgeError
    from fledge.engine import LLM, Chat, Completion, SamplingParams, ScoredText, Stream, load
    from fledge.models import ModelConfig, State

__version__ = "0.1.0"

_ROOM = {
    "FledgeError": "core.errors",
    "LLM": "engine",
    "Chat": "engine",
    "Completion": "engine",
    "SamplingParams": "engine",
    "ScoredText": "engine",
    "Stream": "engine",
    "load": "engine",
    "ModelConfig": "models",
    "State": "models",
}

__all__ = [
    "LLM",
    "Chat",
    "Completion",
    "FledgeError",
    "ModelConfig",
    "SamplingParams",
    "ScoredText",
    "State",
    "Stream",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _ROOM:
        raise AttributeError(f"module 'fledge' has no attribute {name!r}")
    return getattr(import_module(f"fledge.{_ROOM[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
