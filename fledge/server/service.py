"""What outlives a request: the model, the desk, the kept states, the figures; and the way from a job to its events.

The desk's thread and the event loop meet here only: the desk rings, and the loop puts each job's events into a box of
its own.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property, partial

import torch

from fledge.core.errors import FledgeError, UsageError
from fledge.core.files import read_or_create_secret
from fledge.engine.async_engine import AsyncEngine
from fledge.engine.engine import Engine
from fledge.engine.events import FLUSH_INTERVAL, ErrorEvent, Event, FinishEvent, TextRequest
from fledge.engine.generation import make_initial_state
from fledge.engine.llm.llm import LLM
from fledge.engine.prefix_cache.cache import PrefixCache
from fledge.engine.prefix_cache.disk_cache import DiskCache
from fledge.engine.request import QueueFull
from fledge.engine.scheduler import Scheduler
from fledge.engine.states.eviction import OWNER_SHARE
from fledge.engine.states.read_document import source_hash
from fledge.engine.states.shared_store import SharedStateStore
from fledge.engine.states.state_file import StateMetadata, decode_state, encode_state
from fledge.engine.states.store import SessionConflict, StateStore
from fledge.engine.structured.grammar import GrammarVocabulary
from fledge.kernels.native_ops import instruction_set
from fledge.models.native_model import NativeModel
from fledge.models.state import State
from fledge.server.auth import KeyStore, Tenant
from fledge.server.errors import ApiError, api_error
from fledge.server.metrics import ServerMetrics
from fledge.server.settings import ServerSettings

KEEP_ALIVE = 15.0
"""Seconds without an event after which a stream says that it still lives."""


class EventQueue:
    """The events of one job that nobody has fetched yet. All of it in the event loop's thread."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Add one."""
        self._events.append(event)
        self._wake()

    async def take(self) -> list[Event]:
        """All there are, as soon as there is one; none where that takes too long."""
        if not self._events:
            # With asyncio.wait_for every token would have a task of its own.
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            alarm = loop.call_later(KEEP_ALIVE, self._wake)
            try:
                await self._waiter
            finally:
                alarm.cancel()
                self._waiter = None
        events, self._events = self._events, []
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Service:
    """One model, served."""

    def __init__(self, llm: LLM, settings: ServerSettings, identity: str) -> None:
        """identity: of the model's weights; states of other ones are refused."""
        self.llm, self.settings, self.identity = llm, settings, identity
        self.keys = KeyStore() if settings.keys is None else KeyStore.read(settings.keys)
        self.secret = read_secret(settings)
        self.metrics = ServerMetrics(self)
        self.began = int(time.time())
        folder = settings.folder
        self.disk = None
        if folder is not None and settings.cache_disk and settings.cache_memory:
            began = source_hash(llm.read([]), ())  # a tuned initial state is no part of the identity
            self.disk = DiskCache(
                folder / "cache", f"{identity} {_arithmetic(llm)} {began}", max_bytes=settings.cache_disk
            )
        self.cache = (
            PrefixCache(memory_bytes=settings.cache_memory, disk=self.disk, snapshot_interval=settings.cache_every)
            if settings.cache_memory
            else None
        )
        self.shelf = self._states()
        scheduler = Scheduler(slots=settings.slots)
        engine = Engine(
            llm.model, eos_id=llm.tokenizer.eos_id, scheduler=scheduler, max_requests=settings.queue, cache=self.cache
        )
        self.desk = AsyncEngine(engine, llm.tokenizer, self._bell)
        self._boxes: dict[TextRequest, EventQueue] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sessions = dict[tuple[str, str], str | None]()  # in use, and the state at which each stood

    def _states(self) -> StateStore | SharedStateStore | None:
        settings, share = self.settings, OWNER_SHARE if self.keys.several else 1.0
        if settings.shared is not None:
            return SharedStateStore(
                settings.shared, self.identity, self.secret, limit_bytes=settings.shelf, owner_share=share
            )
        if settings.folder is not None:
            return StateStore(settings.folder / "states", self.identity, limit_bytes=settings.shelf, owner_share=share)
        return None

    @cached_property
    def vocabulary(self) -> GrammarVocabulary:
        """What grammars are made over; made on first use."""
        return GrammarVocabulary(self.llm.tokenizer)

    @cached_property
    def beginning(self) -> State:
        """What texts begin from, where the model is."""
        start = make_initial_state(self.llm.model) if self.llm.initial_state is None else self.llm.initial_state
        return start.to(self.llm.device)

    @property
    def name(self) -> str:
        """What the model is called here."""
        return self.settings.name or self.llm.name

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for a request that wants another model."""
        if name is not None and name not in (self.name, "default"):
            message = f"there is no model {name!r} here; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def card(self, tokens: int, template: str | None) -> StateMetadata:
        """What a state that has read so much is described by."""
        return StateMetadata.create(self.identity, self.llm.name, self.llm.config, tokens, template=template)

    @property
    def template(self) -> str:
        """The chat template of requests that name none."""
        return self.llm.template or "world"

    def start(self) -> None:
        """Begin to serve, in the running event loop."""
        # The engine's thread and the event loop's hand the interpreter to each other at every step; at Python's usual
        # interval of 5 ms each would wait for longer than a step takes.
        sys.setswitchinterval(0.0005)
        self._loop = asyncio.get_running_loop()
        self.desk.start()

    async def stop(self) -> None:
        """Finish what is under way, then save what is worth it."""
        await asyncio.to_thread(self.desk.close, self.settings.drain)
        if self.cache is not None:
            await asyncio.to_thread(self.cache.flush)
        if self.disk is not None:
            await asyncio.to_thread(self.disk.close)
        if self.shelf is not None:
            self.shelf.close()

    @asynccontextmanager
    async def events(self, job: TextRequest) -> AsyncIterator[AsyncIterator[list[Event]]]:
        """Have a job done: its events, some at a time (none: still waiting), until every choice has ended.

        Leaving early, as when the client has gone, stops the job. Raises ApiError for what is refused or fails.
        """
        box = self._boxes[job] = EventQueue()
        try:
            self.desk.submit(job)
            yield self._each(job, box)
        except FledgeError as error:
            raise api_error(error, "prompt") from None
        finally:
            del self._boxes[job]
            if job.open_choices:
                self.desk.cancel(job)

    async def _each(self, job: TextRequest, box: EventQueue) -> AsyncIterator[list[Event]]:
        left = max(job.request.n, 1)
        while left:
            events = await box.take()
            for event in events:
                if isinstance(event, ErrorEvent):
                    broken = event.choice < 0 and not isinstance(event.error, QueueFull)
                    raise ApiError(500, str(event.error)) if broken else api_error(event.error)
                left -= isinstance(event, FinishEvent)
            yield events

    def owner(self, tenant: Tenant) -> str:
        """Whose states are whose."""
        return tenant.name if self.keys.needed else ""

    async def known_state(self, tenant: Tenant, text: str, param: str = "fledge.state") -> tuple[State, StateMetadata]:
        """The state that a request names by its handle, or brings, where the model is.

        Raises ApiError for one that is not theirs.
        """
        # Beside the event loop: the shelf waits for the disk, and a state that is brought may be large.
        return await asyncio.to_thread(self._known_state, tenant, text, param)

    def _known_state(self, tenant: Tenant, text: str, param: str) -> tuple[State, StateMetadata]:
        try:
            if text.startswith("st_"):
                state, card = self._taken(self.owner(tenant), self.opened(tenant, text, param), param)
            else:
                state, card = decode_state(base64.b64decode(text, validate=True), self.secret)
            card.check(self.identity, self.llm.name)
            state.check(self.llm.config, 1)
        except ValueError:  # binascii's kind too
            raise ApiError(400, "a state is a handle (st_...) or a state file in base64", param=param) from None
        except FledgeError as error:
            raise api_error(error, param) from None
        return state.to(self.llm.device), card

    def _taken(self, owner: str, id: str, param: str) -> tuple[State, StateMetadata]:
        """A kept state. Raises ApiError 404 for one that has been forgotten."""
        shelf = self.shelf_for(param)
        try:
            shelf.describe(owner, id)
        except FledgeError as error:
            raise ApiError(404, str(error), param=param, code="state_not_found") from None
        return shelf.get(owner, id)

    async def kept(self, tenant: Tenant, state: State, card: StateMetadata, name: str | None = None) -> str:
        """Keep a state; its handle."""
        owner = self.owner(tenant)
        try:
            return self.handle(tenant, await asyncio.to_thread(self.shelf_for("fledge").put, owner, state, card, name))
        except UsageError as error:
            raise api_error(error, "name") from None
        except FledgeError as error:
            raise ApiError(507, str(error), code="no_space") from None

    def packed(self, state: State, card: StateMetadata) -> str:
        """A state for the client to keep, signed."""
        return base64.b64encode(encode_state(state, card, self.secret)).decode()

    def handle(self, tenant: Tenant, id: str) -> str:
        """The name of a kept state, signed for its owner."""
        return f"{id}.{self._signature(tenant, id)}"

    def opened(self, tenant: Tenant, handle: str, param: str) -> str:
        """The id in a handle. Raises ApiError for one that was not given to this owner."""
        id, _, signature = handle.partition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(tenant, id).encode()):
            raise ApiError(404, "there is no such state", param=param, code="state_not_found")
        return id

    def _signature(self, tenant: Tenant, id: str) -> str:
        text = f"{self.owner(tenant)}\0{id}".encode()
        digest = hmac.new(self.secret, text, hashlib.sha256).digest()[:12]
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    @property
    def states(self) -> StateStore | SharedStateStore:
        """Where states are kept. Raises ApiError where they are not."""
        return self.shelf_for("fledge")

    def shelf_for(self, param: str) -> StateStore | SharedStateStore:
        """As `states`; the error names the field that asks for it."""
        if self.shelf is None:
            raise ApiError(400, "this server keeps no states: start it with --folder", param=param)
        return self.shelf

    @asynccontextmanager
    async def session(self, tenant: Tenant, name: str) -> AsyncIterator[str | None]:
        """The handle of a conversation's state, for one request at a time; None where it has not begun."""
        key = (self.owner(tenant), name)
        if key in self._sessions:
            raise ApiError(409, f"session {name!r} is answering another request; wait for it", param="fledge.session")
        self._sessions[key] = None
        try:
            id = self._sessions[key] = await asyncio.to_thread(self.shelf_for("fledge.session").current_state, *key)
            yield None if id is None else self.handle(tenant, id)
        finally:
            del self._sessions[key]

    async def move(self, tenant: Tenant, session: str, handle: str) -> None:
        """Let a conversation that is in use stand at a kept state.

        Raises ApiError 409 where another server has moved it since.
        """
        key, id = (self.owner(tenant), session), handle.partition(".")[0]
        compare_and_set = partial(
            self.shelf_for("fledge.session").compare_and_set, *key, id, expected=self._sessions[key]
        )
        try:
            await asyncio.to_thread(compare_and_set)
        except SessionConflict as error:
            message = f"{error}, perhaps by another server: this answer is no part of it; ask again"
            raise ApiError(409, message, param="fledge.session") from None
        except UsageError as error:
            raise api_error(error, "fledge.session") from None
        except FledgeError as error:
            raise ApiError(507, str(error), code="no_space") from None
        self._sessions[key] = id

    def _bell(self) -> None:
        """From the desk's thread to the event loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._collect)
        except RuntimeError:  # the loop has ended, and with it everybody who would listen
            return

    def _collect(self) -> None:
        assert self._loop is not None
        if self._alarm is not None:
            self._alarm.cancel()
        events = self.desk.drain_events()
        self._alarm = self._loop.call_later(2 * FLUSH_INTERVAL, self._collect) if events else None
        for job, event in events:
            box = self._boxes.get(job)
            if box is not None:
                box.put(event)


def _arithmetic(llm: LLM) -> str:
    """What the last bits of a state depend on beside the weights: what was cached by another arithmetic is not used."""
    native = f"native {instruction_set()}" if isinstance(llm.model, NativeModel) else f"torch {torch.__version__}"
    return f"{llm.weights} {llm.device.type} {native}"


def read_secret(settings: ServerSettings) -> bytes:
    """What states are signed with: that of a file, made on first use; without any file, of this process."""
    path = (
        settings.secret
        or (settings.shared and settings.shared / "secret")
        or (settings.folder / "secret" if settings.folder is not None else None)
    )
    if path is None:
        return secrets.token_bytes(32)
    try:
        found = read_or_create_secret(path, secrets.token_hex(32).encode()).strip()
    except OSError as error:
        raise FledgeError(f"{path}, which states are signed with, cannot be used: {error.strerror}") from None
    if len(found) < 32:
        raise FledgeError(f"{path} is no secret: it must hold at least 32 bytes; remove it to get a new one")
    return found
