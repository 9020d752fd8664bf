"""Inference: sampling, the engine, prefix caching, states, and the `LLM` interface.

A module imports only from its own sub-package and from those before it:

    structured      constraints on generated text: grammars, JSON schemas, tool calls
    prefix_cache    the states after prompt prefixes, in memory and on disk
    (this folder)   sampling and model calls (generation, model_runner), continuous batching (request, sequence,
                    scheduler, engine), and text from the engine (detokenizer, events, text_engine,
                    async_engine)
    states          states as files, stores of states, documents that are read once
    llm             the `LLM` class: text in, text out; chats, streams, adapters

HTTP is in fledge.server, checkpoint formats are in fledge.checkpoint, and the models are in fledge.models.
"""

from fledge.engine.generation import ModelOutput, SampledToken, generate_tokens, prefill
from fledge.engine.llm.async_llm import AsyncLLM
from fledge.engine.llm.batch import BatchStream
from fledge.engine.llm.chat import Chat, ChatTurn
from fledge.engine.llm.llm import LLM
from fledge.engine.llm.loading import load
from fledge.engine.llm.scoring import ScoredText, ScoredToken
from fledge.engine.llm.stream import Completion, Stream, Timings
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.engine.states.state_file import LoadedState, StateMetadata, read_state

__all__ = [
    "LLM",
    "AsyncLLM",
    "BatchStream",
    "Chat",
    "ChatTurn",
    "Completion",
    "LoadedState",
    "ModelOutput",
    "SampledToken",
    "Sampler",
    "SamplingParams",
    "ScoredText",
    "ScoredToken",
    "StateMetadata",
    "Stream",
    "Timings",
    "generate_tokens",
    "load",
    "prefill",
    "read_state",
]
