"""L4: from a model to text. Sampling, the token loop, stop texts, chat, and the `LLM` that ties them together.

One sequence at a time. Not here: HTTP, files (fledge.checkpoint reads those), the mathematics (fledge.models).
"""

from fledge.engine.chat import Chat, Turn
from fledge.engine.generation import Cursor, Step, prefill, tokens
from fledge.engine.loading import load
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.engine.scoring import Score, Scores
from fledge.engine.stream import Completion, Stream, Timings
from fledge.engine.text import LLM

__all__ = [
    "LLM",
    "Chat",
    "Completion",
    "Cursor",
    "Sampler",
    "SamplingParams",
    "Score",
    "Scores",
    "Step",
    "Stream",
    "Timings",
    "Turn",
    "load",
    "prefill",
    "tokens",
]
