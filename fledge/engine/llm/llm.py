"""`LLM`: a model and its tokenizer as one value that reads and writes text.

Text in and out, prompts checked, everything else in the files beside this one. Nothing here changes after it is made,
and states are values, so threads may share an LLM.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fledge import checkpoint
from fledge.core.errors import TokenizerError, UsageError
from fledge.engine.generation import (
    ProgressCallback,
    check_token_ids,
    get_config,
    get_device,
    make_initial_state,
    prefill,
)
from fledge.engine.llm.adapters import Adapters, adapter_list, check_fit, with_changes
from fledge.engine.llm.chat import Chat
from fledge.engine.llm.embedding import embedding
from fledge.engine.llm.scoring import ScoredText, ScoredToken, score
from fledge.engine.llm.stream import Completion, Stream
from fledge.engine.sampling import SamplingParams
from fledge.models.config import ModelConfig
from fledge.models.native_model import NativeModel
from fledge.models.state import State
from fledge.tokenizer import NO_EOS, Tokenizer

Prompt = str | bytes | Sequence[int]
"""Text, its bytes, or token ids."""


@dataclass(frozen=True, eq=False)
class LLM:
    """A model ready to use. `fledge.load` makes one; the constructor takes any model and tokenizer that fit."""

    model: nn.Module
    tokenizer: Tokenizer
    name: str = "model"
    device_reason: str = ""  # why it runs where it runs, and in which dtype
    dtype_reason: str = ""
    start: State | None = None  # of one sequence: what texts begin from; None: the model's own initial state
    source: str = ""  # the checkpoint it came from
    template: str | None = None  # of the chats it was tuned on, where its files tell
    altered: str = (
        ""  # how the weights differ from those of `source`, by adapters or rounding; nothing where they do not
    )

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size != self.config.vocab_size:
            raise TokenizerError(
                f"{self.name} has {self.config.vocab_size} token rows, but the tokenizer {self.tokenizer.vocab_size}; "
                "give the tokenizer the model was trained with"
            )

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return get_config(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return get_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices that are not quantised; everything else is float32."""
        if isinstance(self.model, NativeModel):
            return self.model.dtype
        return next((weight.dtype for weight in self.model.parameters() if weight.dim() == 2), torch.float32)

    @property
    def weights(self) -> str:
        """How the matrices are held, in words: "bfloat16", "int8", "int4+int8"."""
        quantized = self.model.quantized if isinstance(self.model, NativeModel) else ()
        return "+".join(quantized) or str(self.dtype).removeprefix("torch.")

    def generate(
        self, prompt: Prompt, *, state: State | None = None, params: SamplingParams | None = None, **overrides: Any
    ) -> Completion:
        """Continue `prompt`, which follows what `state` has read.

        overrides: fields of SamplingParams, taken instead of those of `params`.
        Raises UsageError for an empty prompt or a bad setting, TokenizerError for an id outside the vocabulary,
        StateError for a state of another model.
        """
        stream = self.stream(prompt, state=state, params=params, **overrides)
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self,
        prompt: Prompt,
        *,
        state: State | None = None,
        params: SamplingParams | None = None,
        progress: ProgressCallback | None = None,
        **overrides: Any,
    ) -> Stream:
        """As `generate`, but the text in pieces as it comes. The errors are raised here, before the first piece.

        Breaking off, or an interrupt, leaves `stream.completion` with the text so far and the state that has read it.
        """
        settings = (params or SamplingParams()).with_overrides(overrides)
        ids = self._ids(prompt)
        if not ids:
            raise UsageError(f"the prompt is empty; {self._advice(state)}")
        return Stream(self.model, self.tokenizer, ids, self._start(state), settings, progress=progress)

    def read(self, text: Prompt, state: State | None = None, progress: ProgressCallback | None = None) -> State:
        """The state after `text`, which follows what `state` has read. Read once, ask many times."""
        ids, start = self._ids(text), self._start(state)
        return prefill(self.model, ids, start, progress=progress).state if ids else start

    def embed(self, text: Prompt) -> Tensor:
        """(A,) float32 of length one: what `text` leaves in the heads. `fledge bench embeddings` measures its worth."""
        ids = self._ids(text)
        if not ids:
            raise UsageError("the text is empty; there is nothing to make a vector of")
        return embedding(self.read(ids))

    def logprobs(self, text: Prompt, state: State | None = None, context: Prompt | None = None) -> ScoredText:
        """How probable each token of `text` is after `context`, which follows what `state` has read.

        Without a state the context may be left out and is then the end-of-text id: the beginning of a document. A
        state does not hold the scores of the token after it, so with one there must be some context.
        """
        ids, start = self._ids(text), self._start(state)
        if context is None and state is None and self.tokenizer.eos_id != NO_EOS:
            context = [self.tokenizer.eos_id]
        before = [] if context is None else self._ids(context)
        if not before:
            raise UsageError("context is empty; give at least one token between the state and the text to be scored")
        found = score(self.model, prefill(self.model, before, start), ids)
        return ScoredText(
            ScoredToken(token, self.tokenizer.decode_bytes([token]), value)
            for token, value in zip(ids, found, strict=True)
        )

    def chat(
        self,
        system: str | None = None,
        template: str | None = None,
        params: SamplingParams | None = None,
        state: State | None = None,
    ) -> Chat:
        """A conversation, which may follow what `state` has read. params: None takes
        `fledge.engine.llm.chat.CHAT_PARAMS`.

        template: one of `fledge.tokenizer.TEMPLATES`; None takes the one the model was tuned with, else "world". Raises
        UsageError for another name.
        """
        start, template = self._start(state), template or self.template or "world"
        return Chat(self.model, self.tokenizer, start, system=system, template=template, params=params)

    def adapted(self, adapter: Adapters) -> LLM:
        """Another LLM on the same weights, with one adapter or several in addition; this one stays as it is.

        Any number of them costs the memory of one model. A file may hold a LoRA or a tuned state, which replaces the
        present one. Raises CheckpointError for an adapter of another base, UsageError for a LoRA on a native model.
        """
        adapters = adapter_list(adapter)
        check_fit(adapters, self)
        return with_changes(self, checkpoint.combine_adapters(adapters))

    def _start(self, state: State | None) -> State:
        if state is None:
            return make_initial_state(self.model) if self.start is None else self.start.to(self.device)
        state.check(self.config, 1)
        return state.to(self.device)

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str | bytes):
            return self.tokenizer.encode(prompt)
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError:
            raise UsageError(f"a prompt is text, bytes or token ids, not {prompt!r:.60}") from None
        check_token_ids(ids, self.config.vocab_size)
        return ids

    def _advice(self, state: State | None) -> str:
        if state is not None:
            return "a state does not hold the scores of the next token, so give at least one token of text to follow it"
        if self.tokenizer.eos_id == NO_EOS:
            return "give at least one character"
        return f"give some text, or pass ids [{self.tokenizer.eos_id}] to begin a new document"
