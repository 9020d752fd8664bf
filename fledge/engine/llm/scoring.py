"""Log probabilities of the tokens of a given text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from fledge.core.errors import UsageError
from fledge.engine.engine import Engine
from fledge.engine.generation import ModelOutput
from fledge.engine.request import Request
from fledge.tokenizer import Tokenizer


class ScoredToken(NamedTuple):
    """One token of a scored text. `logprob` is the natural log probability given everything before it."""

    id: int
    bytes: bytes
    logprob: float


class ScoredText(list[ScoredToken]):
    """The scored tokens of a text, in order."""

    @classmethod
    def from_logprobs(cls, tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float]) -> ScoredText:
        """The scored text with these ids and log probabilities."""
        return cls(
            ScoredToken(token, tokenizer.decode_bytes([token]), logprob)
            for token, logprob in zip(ids, logprobs, strict=True)
        )

    @property
    def total(self) -> float:
        """Natural log probability of the whole text."""
        return math.fsum(token.logprob for token in self)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, which is comparable between models with different tokenizers.

        Raises UsageError for a text without bytes.
        """
        length = sum(len(token.bytes) for token in self)
        if not length:
            raise UsageError("bits_per_byte needs a text of at least one byte")
        return -self.total / math.log(2) / length


def scoring_request(ids: Sequence[int], start: ModelOutput) -> Request:
    """The request for the log probabilities of `ids` (at least one), which follow the text that led to `start`."""
    return Request(tuple(ids), start=start, n=0, prompt_logprobs=0)


def score_texts(model: nn.Module, start: ModelOutput, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Natural log probabilities of the tokens of each text. Each text follows the state `start`."""
    engine, logprobs = Engine(model), [list[float]() for _ in texts]
    indices = {
        engine.add(scoring_request(ids, start), bypass_limit=True): index for index, ids in enumerate(texts) if ids
    }
    while engine.busy:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            if output.prompt_logprobs is not None:
                scores = output.prompt_logprobs.logprobs
                logprobs[indices[output.request_id]] += [score.logprob for score in scores if score is not None]
    return logprobs
