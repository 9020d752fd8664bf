"""`LLM`: a model and its tokenizer, which together read and generate text."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from fledge import checkpoint
from fledge.core.errors import StateError, TokenizerError, UsageError
from fledge.engine.events import TextRequest
from fledge.engine.generation import (
    ModelOutput,
    ProgressCallback,
    check_token_ids,
    get_config,
    get_device,
    make_initial_state,
    prefill,
)
from fledge.engine.llm.adapters import AdapterSources, adapt_model, hash_changes, read_adapters
from fledge.engine.llm.batch import BatchStream
from fledge.engine.llm.chat import Chat
from fledge.engine.llm.embedding import embed_state
from fledge.engine.llm.prompts import Prompt, Prompts, split_prompts
from fledge.engine.llm.scoring import ScoredText, score_texts
from fledge.engine.llm.stream import Completion, Stream
from fledge.engine.request import Request
from fledge.engine.sampling import SamplingParams
from fledge.engine.states.read_document import ReadResult, read_document
from fledge.engine.states.state_file import LoadedState, StateMetadata, read_state, write_state
from fledge.models.adapters import build_tuned_state
from fledge.models.config import ModelConfig
from fledge.models.native_model import NativeModel
from fledge.models.state import State
from fledge.tokenizer import NO_EOS, Tokenizer


@dataclass(frozen=True, eq=False)
class LLM:
    """A model ready to use, made by `fledge.load` or from any model and tokenizer that fit together.

    An LLM never changes, and states are values, so threads may share it.
    """

    model: nn.Module
    tokenizer: Tokenizer
    name: str = "model"
    device_reason: str = ""  # why this device and this dtype were chosen
    dtype_reason: str = ""
    initial_state: State | None = None  # of one sequence: the state before any text; None: the model's own
    source: str = ""  # the checkpoint it was loaded from
    template: str | None = None  # the chat template it was tuned with, if its files record one
    weight_changes: str = ""  # identifies changes to the weights of `source` by adapters or rounding; "" if none

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size != self.config.vocab_size:
            raise TokenizerError(
                f"{self.name} has {self.config.vocab_size} token rows, but the tokenizer has "
                f"{self.tokenizer.vocab_size}; use the tokenizer the model was trained with"
            )

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return get_config(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return get_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices that are not quantized. Everything else is float32."""
        if isinstance(self.model, NativeModel):
            return self.model.dtype
        return next((weight.dtype for weight in self.model.parameters() if weight.dim() == 2), torch.float32)

    @property
    def weights(self) -> str:
        """The formats of the matrices in words: "bfloat16", "int8", "int4+int8"."""
        quantized = self.model.quantized if isinstance(self.model, NativeModel) else ()
        return "+".join(quantized) or str(self.dtype).removeprefix("torch.")

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the weights the model computes with, in hex. A saved state belongs to one identity.

        Includes adapters and rounding while loading, but not a tuned initial state. The first access reads the
        checkpoint again, because a native model does not keep its original weights: seconds for a large model. Raises
        StateError for a model without a checkpoint whose original weights are gone.
        """
        weights = self._read_weights()
        if (
            not weights.tensors.keys() | weights.quantized.keys()
            >= checkpoint.get_expected_shapes(weights.config).keys()
        ):
            raise StateError(
                f"{self.name} was made in memory and does not keep its original weights, so it cannot be compared with "
                "the model of a saved state; load it from a checkpoint"
            )
        base = checkpoint.compute_identity(weights)
        return hashlib.sha256(f"{base}\n{self.weight_changes}".encode()).hexdigest() if self.weight_changes else base

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. Raises UsageError or TokenizerError for anything that is not a prompt."""
        if isinstance(prompt, str | bytes):
            return self.tokenizer.encode(prompt)
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError:
            raise UsageError(f"a prompt is text, bytes or token ids, not {prompt!r:.60}") from None
        check_token_ids(ids, self.config.vocab_size)
        return ids

    @overload
    def generate(
        self, prompt: Prompt, *, state: State | None = None, params: SamplingParams | None = None, **overrides: Any
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        state: State | Sequence[State] | None = None,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        *,
        state: State | Sequence[State] | None = None,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> Completion | list[Completion]:
        """Continue `prompt`, which follows the text that `state` has read.

        A list of prompts gives a list of completions, which are generated in one batch. Each is the completion that the
        prompt would give alone. `state` is then one state for all prompts, or a list with one for each.
        overrides: fields of SamplingParams that replace those of `params`.
        Raises UsageError for an empty prompt or an invalid setting, TokenizerError for an id outside the vocabulary,
        StateError for a state of another model.
        """
        prompts, is_batch = split_prompts(prompt)
        if is_batch:
            batch = self._stream_batch(prompts, state, params, overrides)
            for _ in batch:
                pass
            return [completion for completion in batch.completions if completion is not None]
        if isinstance(state, Sequence):
            raise UsageError("a list of states needs a list of prompts")
        stream = self.stream(prompts[0], state=state, params=params, **overrides)
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
        """As `generate`, but returns the text in pieces as it is generated. Raises the same errors, before the first
        piece.

        After an interrupt, or if the iteration stops early, `stream.completion` has the text so far and its state.
        """
        settings = (params or SamplingParams()).with_overrides(overrides)
        ids = self._prompt_ids(prompt, state)
        return Stream(self.model, self.tokenizer, ids, self._start(state), settings, progress=progress)

    def stream_many(
        self,
        prompts: Prompts,
        *,
        state: State | Sequence[State] | None = None,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> BatchStream:
        """As `generate` for a list of prompts, but returns (index of the prompt, next piece of its text) as generated.

        Raises the same errors, before the first piece. `completions` of the result has the completion of each prompt.
        """
        return self._stream_batch(list(prompts), state, params, overrides)

    def make_requests(
        self, prompts: Sequence[Prompt], state: State | Sequence[State] | None, params: SamplingParams
    ) -> list[TextRequest]:
        """One request for each prompt, for a `TextEngine` or an `AsyncEngine`. Raises the errors of `generate`."""
        states = [state] * len(prompts) if state is None or isinstance(state, State) else list(state)
        if len(states) != len(prompts):
            raise UsageError(
                f"there are {len(prompts)} prompts and {len(states)} states; give one state for each prompt"
            )
        requests = [
            Request(tuple(self._prompt_ids(each, after)), params, self._start(after))
            for each, after in zip(prompts, states, strict=True)
        ]
        return [TextRequest(request, should_return_state=True) for request in requests]

    def _stream_batch(
        self,
        prompts: list[Prompt],
        state: State | Sequence[State] | None,
        params: SamplingParams | None,
        overrides: dict[str, Any],
    ) -> BatchStream:
        settings = (params or SamplingParams()).with_overrides(overrides)
        return BatchStream(self.model, self.tokenizer, self.make_requests(prompts, state, settings))

    def read(self, text: Prompt, state: State | None = None, progress: ProgressCallback | None = None) -> State:
        """The state after `text`, which follows the text that `state` has read."""
        ids, start = self.encode(text), self._start(state)
        return prefill(self.model, ids, start, progress=progress).state if ids else start

    def read_document(
        self,
        text: Prompt,
        path: str | os.PathLike[str],
        *,
        template: str | None = None,
        title: str = "",
        progress: ProgressCallback | None = None,
        on_write_error: Callable[[OSError], None] | None = None,
    ) -> ReadResult:
        """The state after a long text, kept in the file `path`, so that the same text is never read twice.

        If the file holds the state after this text, or after the start of it, only the rest is read. An interrupt keeps
        what has been read. template, title: stored with the state. on_write_error: called if the file cannot be
        written; None raises OSError. Raises UsageError if the text is empty.
        """
        return read_document(
            self.model,
            self.encode(text),
            Path(path),
            start=self._start(None),
            metadata=self.state_metadata(0, template=template, title=title),
            progress=progress,
            on_write_error=on_write_error,
        )

    def save_state(
        self,
        state: State,
        path: str | os.PathLike[str],
        *,
        tokens: int = 0,
        template: str | None = None,
        title: str = "",
    ) -> StateMetadata:
        """Write `state` to a file that `load_state` reads, and return the stored metadata. The write is atomic.

        tokens: how many tokens the state has read; 0 if unknown. template: of the chat the state belongs to; None for
        plain text. Raises StateError if the state does not fit this model, and the errors of `identity`.
        """
        state.check(self.config, 1)
        metadata = self.state_metadata(tokens, template=template, title=title)
        write_state(path, state, metadata)
        return metadata

    def load_state(self, path: str | os.PathLike[str]) -> LoadedState:
        """The state in a file and its metadata: `state, metadata = llm.load_state(path)`.

        Raises StateError if the file is damaged or is not a state, or if other weights made the state.
        """
        state, metadata = read_state(path)
        metadata.check(self.identity, self.name)
        state.check(self.config, 1)
        return LoadedState(state.to(self.device), metadata)

    def state_metadata(self, tokens: int, *, template: str | None = None, title: str = "") -> StateMetadata:
        """The metadata of a state of this model that has read `tokens` tokens."""
        return StateMetadata.create(self.identity, self.name, self.config, tokens, template=template, title=title)

    def embed(self, text: Prompt) -> Tensor:
        """(A,) float32 of length one: an embedding of `text`. `fledge bench embeddings` measures its quality."""
        ids = self.encode(text)
        if not ids:
            raise UsageError("the text is empty; an embedding needs at least one token")
        return embed_state(self.read(ids))

    # A str is a Sequence[str] too, but the first signature takes precedence.
    @overload
    def logprobs(  # type: ignore[overload-overlap]
        self, text: Prompt, state: State | None = None, context: Prompt | None = None
    ) -> ScoredText: ...

    @overload
    def logprobs(
        self, text: Prompts, state: State | None = None, context: Prompt | None = None
    ) -> list[ScoredText]: ...

    def logprobs(
        self, text: Prompt | Prompts, state: State | None = None, context: Prompt | None = None
    ) -> ScoredText | list[ScoredText]:
        """Log probability of each token of `text` after `context`, which follows the text that `state` has read.

        A list of texts gives a list of results; each text follows the same context. Without a state, `context` defaults
        to the end-of-text id: the start of a document. With a state, `context` must have at least one token, because a
        state does not include the logits of the next token.
        """
        prompts, is_batch = split_prompts(text)
        texts = [self.encode(each) for each in prompts]
        logprobs = score_texts(self.model, self.read_context(state, context), texts)
        scored = [ScoredText.from_logprobs(self.tokenizer, *each) for each in zip(texts, logprobs, strict=True)]
        return scored if is_batch else scored[0]

    def read_context(self, state: State | None, context: Prompt | None) -> ModelOutput:
        """Logits and state after `context`, with the defaults and errors of `logprobs`."""
        start = self._start(state)
        if context is None and state is None and self.tokenizer.eos_id != NO_EOS:
            context = [self.tokenizer.eos_id]
        ids = [] if context is None else self.encode(context)
        if not ids:
            raise UsageError("context is empty; give at least one token between the state and the text to be scored")
        return prefill(self.model, ids, start)

    def chat(
        self,
        system: str | None = None,
        template: str | None = None,
        params: SamplingParams | None = None,
        state: State | None = None,
    ) -> Chat:
        """A conversation, which may follow the text that `state` has read.

        template: one of `fledge.tokenizer.TEMPLATES`; None: the one the model was tuned with, or else "world".
        params: None: `fledge.engine.llm.chat.CHAT_PARAMS`. Raises UsageError for an unknown template.
        """
        start, template = self._start(state), template or self.template or "world"
        return Chat(self.model, self.tokenizer, start, system=system, template=template, params=params)

    def with_adapter(self, adapter: AdapterSources) -> LLM:
        """Another LLM on the same weights, with one adapter or several in addition. This LLM does not change.

        Any number of these LLMs need the memory of one model. An adapter may be a LoRA, or a tuned state, which
        replaces the present initial state. Raises CheckpointError for an adapter of another base model, UsageError for
        a LoRA on a native model.
        """
        adapters = read_adapters(adapter)
        checkpoint.check_base(adapters, self._read_weights())
        return self.with_changes(checkpoint.combine_adapters(adapters))

    def with_changes(self, changes: checkpoint.CombinedAdapter) -> LLM:
        """As `with_adapter`, for adapters that have been combined and checked."""
        return replace(
            self,
            model=adapt_model(self.model, changes, self.name),
            template=changes.template or self.template,
            initial_state=build_tuned_state(self.config, changes.state) if changes.state else self.initial_state,
            weight_changes=hash_changes(changes, self.weight_changes),
        )

    def _read_weights(self) -> checkpoint.Checkpoint:
        """The checkpoint, or the weights in memory; a native or adapted model lacks some of those."""
        if self.source:
            return checkpoint.read(self.source)
        return checkpoint.Checkpoint(Path(self.name), "", self.config, self.model.state_dict(), ())

    def _start(self, state: State | None) -> State:
        if state is None:
            return make_initial_state(self.model) if self.initial_state is None else self.initial_state.to(self.device)
        state.check(self.config, 1)
        return state.to(self.device)

    def _prompt_ids(self, prompt: Prompt, state: State | None) -> list[int]:
        """The ids of a prompt. Raises UsageError if there are none."""
        ids = self.encode(prompt)
        if ids:
            return ids
        if state is not None:
            advice = "a state does not include the logits of the next token, so give at least one token to follow it"
        elif self.tokenizer.eos_id == NO_EOS:
            advice = "give at least one character"
        else:
            advice = f"give some text, or pass ids [{self.tokenizer.eos_id}] to start a new document"
        raise UsageError(f"the prompt is empty; {advice}")
