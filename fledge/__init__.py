"""Fledge runs, trains and evaluates RWKV-5 Eagle and RWKV-6 Finch language models.

    import fledge
    llm = fledge.load()
    print(llm.generate("Once upon a time").text)

The public names below are loaded on first use, so importing the package takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fledge.core.errors import FledgeError
    from fledge.engine import (
        LLM,
        AsyncLLM,
        Chat,
        Completion,
        LoadedState,
        SamplingParams,
        ScoredText,
        StateMetadata,
        Stream,
        load,
        read_state,
    )
    from fledge.models import ModelConfig, State

__version__ = "0.1.0"

_MODULES = {
    "FledgeError": "core.errors",
    "AsyncLLM": "engine",
    "LLM": "engine",
    "Chat": "engine",
    "Completion": "engine",
    "LoadedState": "engine",
    "SamplingParams": "engine",
    "ScoredText": "engine",
    "StateMetadata": "engine",
    "Stream": "engine",
    "load": "engine",
    "read_state": "engine",
    "ModelConfig": "models",
    "State": "models",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "Chat",
    "Completion",
    "FledgeError",
    "LoadedState",
    "ModelConfig",
    "SamplingParams",
    "ScoredText",
    "State",
    "StateMetadata",
    "Stream",
    "__version__",
    "load",
    "read_state",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'fledge' has no attribute {name!r}")
    return getattr(import_module(f"fledge.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
