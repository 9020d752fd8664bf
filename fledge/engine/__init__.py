"""L4: from a model to text. Sampling, the token loop, stop texts, chat, and the `LLM` that ties them together.

What is exported here has to do with one text at a time. Beside it, by their own names:

    engine, scheduler, task, batch, request    many requests on one model, a call of it at a time
    desk, job, outbox                          the engine in a thread of its own, for callers who want text
    cache, radix, snapshots, snapshot_store    states after prefixes that were read before, in memory and on disk
    statefile, shelf, commons, reading         states as files, kept on purpose, and of long texts read once
    constraint, tools                          what a text must fit, and calls of functions
    view, embedding                            what a state looks like, and a text as a vector
    adapting, calibration                      LoRAs and tuned states on a model, and what quantising wants to know

Not here: HTTP, checkpoints (fledge.checkpoint reads those), the mathematics (fledge.models).
"""

from fledge.engine.generation import ModelOutput, SampledToken, generate_tokens, prefill
from fledge.engine.llm.chat import Chat, ChatTurn
from fledge.engine.llm.llm import LLM
from fledge.engine.llm.loading import load
from fledge.engine.llm.scoring import ScoredText, ScoredToken
from fledge.engine.llm.stream import Completion, Stream, Timings
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.engine.states.state_file import LoadedState, StateMetadata, read_state

__all__ = [
    "LLM",
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
