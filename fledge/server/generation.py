"""One generation: limits, the state it continues, the request to the engine, and the states that it saves.

Chat and completion requests use it in the same way. They differ in their prompts and responses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from fledge.core.errors import FledgeError, UsageError
from fledge.engine.events import FinishEvent, PromptLogprobsEvent, TextEvent, TextRequest, TextToken
from fledge.engine.request import Request
from fledge.engine.sampling import SamplingParams
from fledge.engine.states.state_file import StateMetadata
from fledge.engine.states.store import check_name
from fledge.engine.structured.grammar import Constraint
from fledge.models.state import State
from fledge.server.auth import Tenant
from fledge.server.errors import ApiError, to_api_error
from fledge.server.latency import LatencyTracker
from fledge.server.prompts import EncodedPrompt
from fledge.server.schema import FledgeOptions, GenerationRequest
from fledge.server.service import Service


@dataclass(frozen=True, eq=False)
class GenerationParams:
    """What to generate."""

    prompt: EncodedPrompt
    sampling: SamplingParams
    options: FledgeOptions
    n: int = 1  # completions; 0 only reads the prompt
    logprobs: int | None = None  # alternatives to report with each token; None: no log probabilities
    prompt_logprobs: int | None = None  # as `logprobs`, for the prompt
    constraint: Constraint | None = None
    suffix_ids: tuple[int, ...] = ()  # read into the state after the text
    template: str | None = None  # name of the chat template
    show_held: bool = True  # whether text that could have become a stop text is emitted when generation ends


@dataclass(eq=False)
class Generation:
    """A running generation: `async with Generation(...) as generation: async for events in generation.events: ...`."""

    service: Service
    tenant: Tenant
    params: GenerationParams
    finish_events: list[FinishEvent] = field(default_factory=list)
    states: dict[int, str] = field(default_factory=dict)  # by choice: a handle, or a state file in base64
    prompt_tokens: list[TextToken] = field(default_factory=list)  # with log probabilities, if they are requested
    events: AsyncIterator[list[TextEvent | FinishEvent]] = field(init=False)
    num_prompt_tokens: int = field(default=0, init=False)  # that were read; fewer than the prompt has after a deadline
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack, init=False, repr=False)
    _start_metadata: StateMetadata | None = field(default=None, init=False, repr=False)
    _latency: LatencyTracker = field(init=False, repr=False)
    _request: TextRequest | None = field(default=None, init=False, repr=False)  # after the engine has accepted it
    _charged_tokens: int = field(default=0, init=False)

    async def __aenter__(self) -> Generation:
        self._latency = LatencyTracker(self.service.metrics)
        try:
            self._stack.callback(self._charge)
            request = await self._prepare()
            engine_events = await self._stack.enter_async_context(self.service.generate(request))
            self._request = request
            if self.params.prompt_logprobs is None:
                self.num_prompt_tokens = len(request.request.ids)
            self._charge()
            self.events = self._process(engine_events)
        except BaseException as error:
            await self._stack.aclose()
            if isinstance(error, FledgeError):  # a stream that has started can report only an ApiError
                raise to_api_error(error) from None
            raise
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()

    async def open(self) -> list[TextEvent | FinishEvent]:
        """Enter and return the first events, while an error can still set the status. Call `close` at the end."""
        await self.__aenter__()
        try:
            while not (events := await anext(self.events)) and self._is_scoring:
                pass
        except BaseException:
            await self.close()
            raise
        return events

    async def close(self) -> None:
        """Release everything, and cancel the request if it is still running. Later calls have no effect."""
        await self._stack.aclose()

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return max((event.cached_tokens for event in self.finish_events), default=0)

    def summarize(self) -> dict[str, Any]:
        """The field `fledge` of the response."""
        finish_events = sorted(self.finish_events, key=lambda event: event.choice)
        first_token = self._latency.time_to_first_token
        summary: dict[str, Any] = {
            "seeds": [event.seed for event in finish_events],
            "reasons": [event.reason for event in finish_events],
            "cached_tokens": self.cached_tokens,
            "seconds_to_first_token": first_token and round(first_token, 6),
            "seconds": round(self._latency.seconds, 6),
        }
        if self.states:
            summary["states"] = [self.states[choice] for choice in sorted(self.states)]
        return summary

    @property
    def _returns_state(self) -> bool:
        return self.params.options.return_state is not None or self.params.options.session is not None

    @property
    def _is_scoring(self) -> bool:
        """Whether the engine still computes log probabilities of the prompt."""
        is_scored = self.params.prompt_logprobs is not None
        return is_scored and self.num_prompt_tokens < len(self.params.prompt.ids)

    def _charge(self) -> None:
        """Charge the key for the tokens since the last call. A client that disconnects early pays for what it used."""
        # A copy, because the engine's thread may be adding a choice.
        choices = () if self._request is None else list(self._request.choices.values())
        total = self.num_prompt_tokens + sum(choice.sampled_tokens for choice in choices)
        self.tenant.spend_tokens(total - self._charged_tokens)
        self._charged_tokens = total

    def _check_limits(self) -> None:
        """Raise ApiError for a request that is not allowed, before any work is done for it."""
        options, settings = self.params.options, self.service.settings
        if options.priority > self.tenant.max_priority:
            message = f"priority is {options.priority}; this key may use up to {self.tenant.max_priority}"
            raise ApiError(403, message, param="fledge.priority")
        if self.params.n > settings.slots:
            message = f"n is {self.params.n}; this server generates up to {settings.slots} completions of a prompt"
            raise ApiError(400, message, param="n")
        check_prompt_length(self.service, len(self.params.prompt.ids), "prompt")
        if options.return_state == "handle":
            self.service.require_state_store("fledge.return_state")
        check_state_name(options.session, "fledge.session")
        check_state_name(options.branch, "fledge.branch")

    async def _prepare(self) -> TextRequest:
        """The request for the engine."""
        self._check_limits()
        params, options = self.params, self.params.options
        deadline = None if options.deadline is None else time.monotonic() + options.deadline
        start, origin = await self._load_start()
        is_cacheable = options.cache and origin is not None and params.prompt_logprobs is None
        request = Request(
            params.prompt.ids,
            params.sampling,
            start,
            n=params.n,
            priority=options.priority,
            deadline=deadline,
            cache_namespace=f"{self.service.get_owner(self.tenant)}\0{origin}" if is_cacheable else None,
            message_ends=params.prompt.message_ends,
            constraint=params.constraint,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
        )
        return TextRequest(
            request,
            suffix_ids=params.suffix_ids,
            should_return_state=self._returns_state,
            should_cache_state=bool(params.suffix_ids),
            show_held=params.show_held,
        )

    async def _load_start(self) -> tuple[State | None, str | None]:
        """The state to continue from, and its name in the cache namespace (None: it cannot be cached)."""
        handle = await self._lock_sessions()
        if handle is None:
            return self.service.llm.initial_state, ""
        state, self._start_metadata = await self.service.load_state(self.tenant, handle)
        return state, handle if handle.startswith("st_") else None

    async def _lock_sessions(self) -> str | None:
        """Lock the session and the branch, if there are any. Returns the handle or the inline state to continue."""
        session, branch = self.params.options.session, self.params.options.branch
        if session is None:
            if branch is not None:
                raise ApiError(400, "a branch needs a session to branch from", param="fledge.branch")
            return self.params.options.state
        if branch == session:
            raise ApiError(400, "a branch must have another name than its session", param="fledge.branch")
        if self.params.options.state is not None or self.params.n > 1:
            message = "a session cannot be combined with a state or with n > 1"
            raise ApiError(400, message, param="fledge.session")
        handle = await self._stack.enter_async_context(self.service.lock_session(self.tenant, session))
        if branch is not None:
            existing = await self._stack.enter_async_context(self.service.lock_session(self.tenant, branch))
            if handle is None:
                message = f"there is no session {session!r}"
                raise ApiError(404, message, param="fledge.session", code="session_not_found")
            if existing is not None:
                raise ApiError(409, f"session {branch!r} already exists", param="fledge.branch")
        return handle

    async def _process(self, engine_events: AsyncIterator[list[Any]]) -> AsyncIterator[list[TextEvent | FinishEvent]]:
        """Account for events, and save states before the last FinishEvent is passed on."""
        ended = list[FinishEvent]()
        async for batch in engine_events:
            events = list[TextEvent | FinishEvent]()
            for event in batch:
                if isinstance(event, PromptLogprobsEvent):
                    self.prompt_tokens += event.tokens
                    self.num_prompt_tokens = event.computed_tokens
                else:
                    events.append(event)
            self._charge()
            self._latency.record(events, returns_state=self._returns_state)
            ended += [event for event in events if isinstance(event, FinishEvent)]
            self.finish_events = [event._replace(state=None) for event in ended]
            if len(ended) == max(self.params.n, 1):
                await self._save_states(ended)
                self._latency.stop()
            if events or not batch:
                yield events

    async def _save_states(self, finish_events: list[FinishEvent]) -> None:
        """Save or encode the final states. This happens after the last completion has ended, so that none waits."""
        for event in finish_events:
            try:
                await self._save_state(event)
            except FledgeError as error:
                message = f"the text is complete, but its state could not be saved: {error}"
                raise ApiError(500, message, code="state_not_kept") from None

    async def _save_state(self, event: FinishEvent) -> None:
        options = self.params.options
        if event.state is None:
            return
        tokens_before = 0 if self._start_metadata is None else self._start_metadata.tokens
        tokens = tokens_before + len(self.params.prompt.ids) + len(event.ids)
        metadata = self.service.make_metadata(tokens, self.params.template)
        if options.return_state == "inline":
            self.states[event.choice] = await asyncio.to_thread(self.service.encode_state, event.state, metadata)
        if options.return_state == "handle" or options.session is not None:
            handle = await self.service.save_state(self.tenant, event.state, metadata)
            self.states.setdefault(event.choice, handle)
            if options.session is not None:
                await self.service.update_session(self.tenant, options.branch or options.session, handle)


async def compute_state(service: Service, tenant: Tenant, request: Request) -> State:
    """The state after a request that only reads (`n=0`). The key is charged when the engine has accepted it."""
    async with service.generate(TextRequest(request, should_return_state=True)) as batches:
        tenant.spend_tokens(len(request.ids))
        async for events in batches:
            for event in events:
                assert isinstance(event, FinishEvent) and event.state is not None
                state = event.state
    return state


def limit_sampling(
    sampling: SamplingParams, request: GenerationRequest, tenant: Tenant, service: Service
) -> SamplingParams:
    """The sampling parameters with `max_tokens` limited by the key and the server.

    Raises ApiError if the request explicitly exceeds the limit, and for banned ids outside the vocabulary.
    """
    limit, requested = min(tenant.max_tokens, service.settings.max_tokens_limit), request.requested_max_tokens
    if requested is not None and requested > limit:
        raise ApiError(400, f"max_tokens is {requested}; the limit is {limit}", param="max_tokens")
    for token in sampling.ban:
        if token >= service.llm.config.vocab_size:
            message = f"token id {token} is outside this model's vocabulary of {service.llm.config.vocab_size}"
            raise ApiError(400, message, param="fledge.ban")
    return replace(sampling, max_tokens=min(sampling.max_tokens, limit))


def check_prompt_length(service: Service, tokens: int, param: str) -> None:
    """Raise ApiError for a prompt that is longer than the server allows."""
    limit = service.settings.max_prompt_tokens
    if tokens > limit:
        message = f"the prompt has {tokens} tokens; the limit is {limit}"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def check_state_name(name: str | None, param: str) -> None:
    """Raise ApiError for an invalid name of a state or a session."""
    if name is None:
        return
    try:
        check_name(name)
    except UsageError as error:
        raise to_api_error(error, param) from None
