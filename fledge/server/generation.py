"""One request for text from beginning to end: limits, the state it goes on from, the job, the state that is kept.

Chat and completions differ in their prompts and bodies; everything in between is here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fledge.core.errors import FledgeError, UsageError
from fledge.engine.events import Event, FinishEvent, TextRequest, TextToken
from fledge.engine.generation import ModelOutput
from fledge.engine.request import Request
from fledge.engine.sampling import SamplingParams
from fledge.engine.states.state_file import StateMetadata
from fledge.engine.states.store import check_name
from fledge.engine.structured.grammar import Constraint
from fledge.models.state import State
from fledge.server.auth import Tenant
from fledge.server.errors import ApiError, api_error
from fledge.server.latency import LatencyTracker
from fledge.server.prompts import ChatPrompt
from fledge.server.schema import FledgeOptions
from fledge.server.scores import PromptScoring
from fledge.server.service import Service

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class GenerationParams:
    """What is to be written."""

    prompt: ChatPrompt
    params: SamplingParams
    options: FledgeOptions
    n: int = 1
    logprobs: int | None = None
    constraint: Constraint | None = None
    closing: tuple[int, ...] = ()
    template: str | None = None
    show_held: bool = True
    scored: int | None = None  # how many probable tokens are told with each token of the prompt; None: nothing is


class ConcurrencySlot:
    """One request of a key, counted once however many exchanges it takes: `async with Visit(tenant): ...`."""

    def __init__(self, tenant: Tenant) -> None:
        """Raises ApiError 429 where it is one too many."""
        tenant.enter()
        self._stack = ExitStack()
        self._stack.callback(tenant.leave)

    async def close(self) -> None:
        """Count it out. May be called again."""
        self._stack.close()

    async def __aenter__(self) -> ConcurrencySlot:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()


@dataclass(eq=False)
class Generation:
    """Used as `async with Exchange(...) as exchange: async for events in exchange.events: ...`."""

    service: Service
    tenant: Tenant
    order: GenerationParams
    visit: ConcurrencySlot | None = None  # that this is a part of; None: it is one itself
    ends: list[FinishEvent] = field(default_factory=list)
    states: dict[int, str] = field(default_factory=dict)  # of each choice: a handle, or the state itself
    known: list[TextToken] = field(default_factory=list)  # the prompt's, where these are scored
    events: AsyncIterator[list[Event]] = field(init=False)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack, init=False, repr=False)
    _card: StateMetadata | None = field(default=None, init=False, repr=False)
    _times: LatencyTracker = field(init=False, repr=False)
    _job: TextRequest | None = field(default=None, init=False, repr=False)  # once it has been taken in
    _read: int = field(default=0, init=False)  # tokens of the prompt
    _paid: int = field(default=0, init=False)  # tokens in all

    async def __aenter__(self) -> Generation:
        self._times = LatencyTracker(self.service.metrics)
        try:
            if self.visit is None:
                await self._stack.enter_async_context(ConcurrencySlot(self.tenant))
            self._stack.callback(self._pay)
            job = await self._prepared()
            events = await self._stack.enter_async_context(self.service.events(job))
            self._job = job
            self._read += len(job.request.ids)
            self._pay()
            self.events = self._watched(events)
        except BaseException as error:
            await self._stack.aclose()
            if isinstance(error, FledgeError):  # a stream may be on its way and needs one that it can tell
                raise api_error(error) from None
            raise
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()

    async def open(self) -> list[Event]:
        """Enter, and wait for the first events, while an error can still be told by the status. `close` follows."""
        await self.__aenter__()
        try:
            return await anext(self.events)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of everything, the job too if it still runs. May be called again."""
        await self._stack.aclose()

    @property
    def _wants_state(self) -> bool:
        return self.order.options.return_state is not None or self.order.options.session is not None

    def _pay(self) -> None:
        """Take what has been read and written since the last time from the key's allowance.

        It is not left to the end: who goes away before the last token has had the others.
        """
        choices = () if self._job is None else list(self._job.choices.values())  # the desk's thread may be adding one
        cost = self._read + sum(choice.sampled_tokens for choice in choices)
        self.tenant.spend(cost - self._paid)
        self._paid = cost

    @property
    def read(self) -> int:
        """Tokens of the prompt; where a deadline cut its scoring, those before the cut."""
        return self._read

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were known."""
        return max((end.cached_tokens for end in self.ends), default=0)

    def summary(self) -> dict[str, Any]:
        """The answer's field `fledge`."""
        found: dict[str, Any] = {
            "seeds": [end.seed for end in sorted(self.ends, key=lambda end: end.choice)],
            "reasons": [end.reason for end in sorted(self.ends, key=lambda end: end.choice)],
            "cached_tokens": self.cached,
            "seconds_to_first_token": self._times.first and round(self._times.first, 6),
            "seconds": round(self._times.seconds, 6),
        }
        if self.states:
            found["states"] = [self.states[choice] for choice in sorted(self.states)]
        return found

    def _check(self) -> None:
        """Raise ApiError for what will not be done, before anything is."""
        options, settings = self.order.options, self.service.settings
        if options.priority > self.tenant.max_priority:
            message = f"priority is {options.priority}; this key may ask for up to {self.tenant.max_priority}"
            raise ApiError(403, message, param="fledge.priority")
        if self.order.n > settings.slots:
            raise ApiError(400, f"n is {self.order.n}; this server writes up to {settings.slots} at once", param="n")
        check_length(self.service, len(self.order.prompt.ids), "prompt")
        if options.return_state == "handle":
            self.service.shelf_for("fledge.return_state")
        check_label(options.session, "fledge.session")
        check_label(options.branch, "fledge.branch")

    async def _prepared(self) -> TextRequest:
        """What the desk is asked for."""
        self._check()
        options = self.order.options
        deadline = None if options.deadline is None else time.monotonic() + options.deadline
        start, origin = await self._start()
        ids, space = self.order.prompt.ids, None
        begin: State | ModelOutput | None = start
        if self.order.scored is not None and ids:
            ids, begin = (), await self._score(start, self.order.scored, deadline)
        elif options.cache and origin is not None:
            space = f"{self.service.owner(self.tenant)}\0{origin}"
        request = Request(
            ids,
            self.order.params,
            begin,
            n=self.order.n,
            priority=options.priority,
            deadline=deadline,
            cache_namespace=space,
            message_ends=self.order.prompt.marks,
            constraint=self.order.constraint,
            logprobs=self.order.logprobs,
        )
        return TextRequest(
            request,
            suffix_ids=self.order.closing,
            should_return_state=self._wants_state,
            should_cache_state=bool(self.order.closing),
            show_held=self.order.show_held,
        )

    async def _start(self) -> tuple[State | None, str | None]:
        """The state to go on from, and what the cache calls texts that do; None: nothing it could recognise."""
        options = self.order.options
        if options.session is None and options.branch is not None:
            raise ApiError(400, "a branch needs the session that it leaves", param="fledge.branch")
        if options.session is not None:
            if options.branch == options.session:
                raise ApiError(
                    400, "a branch needs another name than the session that it leaves", param="fledge.branch"
                )
            if options.state is not None or self.order.n > 1:
                raise ApiError(400, "a session has its own state and one answer a time", param="fledge.session")
            handle = await self._stack.enter_async_context(self.service.session(self.tenant, options.session))
            if options.branch is not None:
                taken = await self._stack.enter_async_context(self.service.session(self.tenant, options.branch))
                if handle is None:
                    message = f"there is no session {options.session!r}"
                    raise ApiError(404, message, param="fledge.session", code="session_not_found")
                if taken is not None:
                    raise ApiError(409, f"{options.branch!r} is there already", param="fledge.branch")
        else:
            handle = options.state
        if handle is None:
            return self.service.llm.initial_state, ""
        state, self._card = await self.service.known_state(self.tenant, handle)
        return state, handle if handle.startswith("st_") else None

    async def _score(self, start: State | None, top: int, deadline: float | None) -> ModelOutput:
        """Read the prompt here, for the likelihoods of its tokens; the place from which the job goes on."""
        scoring = PromptScoring(self.service, start, self.order.prompt.ids, top)
        async for count in scoring.pieces(deadline):
            self._read += count
            self._pay()
        self.known = scoring.tokens
        return scoring.cursor

    async def _watched(self, events: AsyncIterator[list[Event]]) -> AsyncIterator[list[Event]]:
        ended = list[FinishEvent]()
        async for found in events:
            self._pay()
            self._times.note(found, closing=self._wants_state)
            ended += [event for event in found if isinstance(event, FinishEvent)]
            self.ends = [end._replace(state=None) for end in ended]
            if len(ended) == max(self.order.n, 1):
                for end in ended:  # now that no other text waits for it
                    try:
                        await self._keep(end)
                    except FledgeError as error:
                        message = f"the text is whole, but its state could not be kept: {error}"
                        raise ApiError(500, message, code="state_not_kept") from None
                self._times.end()
            yield found

    async def _keep(self, end: FinishEvent) -> None:
        """Keep the state of a text that has ended, where that is wanted."""
        options = self.order.options
        if end.state is None:
            return
        before = 0 if self._card is None else self._card.tokens
        card = self.service.card(before + len(self.order.prompt.ids) + len(end.ids), self.order.template)
        if options.return_state == "inline":
            self.states[end.choice] = await asyncio.to_thread(self.service.packed, end.state, card)
        if options.return_state == "handle" or options.session is not None:
            handle = await self.service.kept(self.tenant, end.state, card)
            self.states.setdefault(end.choice, handle)
            if options.session is not None:
                await self.service.move(self.tenant, options.branch or options.session, handle)


class EventStream(StreamingResponse):
    """Server-sent events of open exchanges, which are closed however it ends: also where it never begins."""

    def __init__(self, pieces: AsyncIterator[bytes], exchanges: Sequence[Generation | ConcurrencySlot]) -> None:
        super().__init__(pieces, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._exchanges = exchanges

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer to one request."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for exchange in self._exchanges:
                await exchange.close()


async def unless_gone(request: HttpRequest, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. The body must have been read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise ApiError(499, "the client has gone")
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()


def with_limits(params: SamplingParams, tenant: Tenant, service: Service, wanted: int | None) -> SamplingParams:
    """The settings with as many tokens as the key and the server allow. Raises ApiError where more are asked for."""
    most = min(tenant.max_tokens, service.settings.most_tokens)
    if wanted is not None and wanted > most:
        raise ApiError(400, f"max_tokens is {wanted}; at most {most} may be asked for", param="max_tokens")
    size = service.llm.config.vocab_size
    for token in params.ban:
        if token >= size:
            message = f"token id {token} is outside this model's vocabulary of {size}"
            raise ApiError(400, message, param="fledge.ban")
    return replace(params, max_tokens=min(params.max_tokens, most))


def check_length(service: Service, tokens: int, param: str) -> None:
    """Raise ApiError where a request wants more read at once than the server allows."""
    if tokens > service.settings.prompt_tokens:
        message = f"the prompt has {tokens} tokens; at most {service.settings.prompt_tokens} are taken"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def check_label(name: str | None, param: str) -> None:
    """Raise ApiError for a name under which nothing could be kept."""
    try:
        check_name(name)
    except UsageError as error:
        raise api_error(error, param) from None
