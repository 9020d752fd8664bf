"""Everything that outlives a request: the model, the engine, the prefix cache, the state store and the metrics.

Events pass from the engine's thread to the event loop only here. The engine notifies the loop, and the loop moves the
events of each request into its own queue.
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
from starlette.requests import Request as HttpRequest

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
from fledge.engine.states.state_file import LoadedState, StateMetadata, decode_state, encode_state
from fledge.engine.states.store import SessionConflict, StateStore
from fledge.engine.structured.grammar import GrammarVocabulary
from fledge.kernels.native_ops import instruction_set
from fledge.models.native_model import NativeModel
from fledge.models.state import State
from fledge.server.auth import KeyStore, Tenant
from fledge.server.errors import ApiError, to_api_error
from fledge.server.metrics import ServerMetrics
from fledge.server.settings import ServerSettings

KEEP_ALIVE_SECONDS = 15.0
"""A stream without events for this long sends a comment, so that proxies and clients do not time out."""

SWITCH_INTERVAL = 0.0005
"""The engine's thread and the event loop pass the GIL to each other at every step. At Python's default of 5 ms,
each would wait longer than a step takes."""

MIN_SECRET_BYTES = 32


class EventQueue:
    """Events of one request that are waiting to be read. Used only in the event loop's thread."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)
        self._wake()

    async def get_all(self) -> list[Event]:
        """Wait for an event and return all that are in the queue, or none after `KEEP_ALIVE_SECONDS`."""
        if not self._events:
            # asyncio.wait_for would create a task for every token.
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(KEEP_ALIVE_SECONDS, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        events, self._events = self._events, []
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Service:
    """A model with everything that is needed to serve it."""

    def __init__(self, llm: LLM, settings: ServerSettings, identity: str) -> None:
        """identity: the hash of the model's weights. States of other weights are rejected."""
        self.llm, self.settings, self.identity = llm, settings, identity
        self.keys = KeyStore() if settings.keys is None else KeyStore.read(settings.keys)
        self.secret = read_secret(settings)
        self.created_at = int(time.time())
        self.disk_cache = self._open_disk_cache()
        self.prefix_cache = self._create_prefix_cache()
        self.state_store = self._open_state_store()
        engine = Engine(
            llm.model,
            eos_id=llm.tokenizer.eos_id,
            scheduler=Scheduler(slots=settings.slots),
            max_requests=settings.max_requests,
            cache=self.prefix_cache,
        )
        self.async_engine = AsyncEngine(engine, llm.tokenizer, self._schedule_delivery)
        self.metrics = ServerMetrics(engine, self.state_store)
        self._queues: dict[TextRequest, EventQueue] = {}
        self._delivery_timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Sessions with a request in progress: (owner, name) -> id of the state before the request, None if new.
        self._locked_sessions = dict[tuple[str, str], str | None]()

    def _open_disk_cache(self) -> DiskCache | None:
        folder, settings = self.settings.folder, self.settings
        if folder is None or not settings.cache_disk or not settings.cache_memory:
            return None
        initial_state = source_hash(self.llm.read([]), ())  # `identity` does not cover a tuned initial state
        key = f"{self.identity} {_describe_arithmetic(self.llm)} {initial_state}"
        return DiskCache(folder / "cache", key, max_bytes=settings.cache_disk)

    def _create_prefix_cache(self) -> PrefixCache | None:
        memory, interval = self.settings.cache_memory, self.settings.snapshot_interval
        if not memory:
            return None
        return PrefixCache(memory_bytes=memory, disk=self.disk_cache, snapshot_interval=interval)

    def _open_state_store(self) -> StateStore | SharedStateStore | None:
        settings = self.settings
        limit, share = settings.state_storage, OWNER_SHARE if self.keys.has_several_tenants else 1.0
        if settings.shared is not None:
            return SharedStateStore(settings.shared, self.identity, self.secret, limit_bytes=limit, owner_share=share)
        if settings.folder is not None:
            return StateStore(settings.folder / "states", self.identity, limit_bytes=limit, owner_share=share)
        return None

    @cached_property
    def grammar_vocabulary(self) -> GrammarVocabulary:
        """The vocabulary for compiling constraints, created on first use."""
        return GrammarVocabulary(self.llm.tokenizer)

    @cached_property
    def initial_state(self) -> State:
        """The state before the first token, on the model's device."""
        state = self.llm.initial_state
        return (make_initial_state(self.llm.model) if state is None else state).to(self.llm.device)

    @property
    def model_name(self) -> str:
        """The name of the model in requests and responses."""
        return self.settings.name or self.llm.name

    @property
    def default_template(self) -> str:
        """The chat template of requests that name none."""
        return self.llm.template or "world"

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 if a request names another model."""
        if name is not None and name not in (self.model_name, "default"):
            message = f"there is no model {name!r}; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def start(self) -> None:
        """Start the engine. Call this in the event loop that reads its events."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._loop = asyncio.get_running_loop()
        self.async_engine.start()

    async def stop(self) -> None:
        """Finish the running requests, then save the prefix cache and close the state store."""
        await asyncio.to_thread(self.async_engine.close, self.settings.drain_seconds)
        if self.prefix_cache is not None:
            await asyncio.to_thread(self.prefix_cache.flush)
        if self.disk_cache is not None:
            await asyncio.to_thread(self.disk_cache.close)
        if self.state_store is not None:
            self.state_store.close()

    @asynccontextmanager
    async def generate(self, request: TextRequest) -> AsyncIterator[AsyncIterator[list[Event]]]:
        """Run a request. Yields its events in batches, until every completion has ended.

        An empty batch means that a keep-alive is due.

        Leaving the context early cancels the request. Raises ApiError if it is rejected or fails.
        """
        queue = self._queues[request] = EventQueue()
        try:
            self.async_engine.submit(request)
            yield self._read_events(request, queue)
        except FledgeError as error:
            raise to_api_error(error, "prompt") from None
        finally:
            del self._queues[request]
            if request.open_choices:
                self.async_engine.cancel(request)

    async def _read_events(self, request: TextRequest, queue: EventQueue) -> AsyncIterator[list[Event]]:
        num_open = max(request.request.n, 1)
        while num_open:
            events = await queue.get_all()
            for event in events:
                if isinstance(event, ErrorEvent):
                    is_internal = event.choice < 0 and not isinstance(event.error, QueueFull)
                    raise ApiError(500, str(event.error)) if is_internal else to_api_error(event.error)
                num_open -= isinstance(event, FinishEvent)
            yield events

    def get_owner(self, tenant: Tenant) -> str:
        """The owner of a tenant's states and sessions."""
        return tenant.name if self.keys.is_required else ""

    def make_metadata(self, tokens: int, template: str | None) -> StateMetadata:
        """The metadata of a state that has read this many tokens."""
        return StateMetadata.create(self.identity, self.llm.name, self.llm.config, tokens, template=template)

    async def load_state(self, tenant: Tenant, text: str, param: str = "fledge.state") -> LoadedState:
        """The state of a handle, or a state file in base64, on the model's device.

        Raises ApiError for a state that does not exist, belongs to another tenant or does not fit the model.
        """
        # In a thread, because it may wait for the disk, and an uploaded state may be large.
        return await asyncio.to_thread(self._load_state, tenant, text, param)

    def _load_state(self, tenant: Tenant, text: str, param: str) -> LoadedState:
        try:
            if text.startswith("st_"):
                state, metadata = self._load_saved(
                    self.get_owner(tenant), self.parse_handle(tenant, text, param), param
                )
            else:
                state, metadata = decode_state(base64.b64decode(text, validate=True), self.secret)
            metadata.check(self.identity, self.llm.name)
            state.check(self.llm.config, 1)
        except ValueError:  # includes binascii.Error
            message = "a state must be a handle (st_...) or a state file in base64"
            raise ApiError(400, message, param=param) from None
        except FledgeError as error:
            raise to_api_error(error, param) from None
        return LoadedState(state.to(self.llm.device), metadata)

    def _load_saved(self, owner: str, id: str, param: str) -> LoadedState:
        store = self.require_state_store(param)
        try:
            store.describe(owner, id)
        except FledgeError as error:
            raise ApiError(404, str(error), param=param, code="state_not_found") from None
        return store.get(owner, id)

    async def save_state(self, tenant: Tenant, state: State, metadata: StateMetadata, name: str | None = None) -> str:
        """Save a state and return its handle."""
        store, owner = self.require_state_store(), self.get_owner(tenant)
        try:
            return self.make_handle(tenant, await asyncio.to_thread(store.put, owner, state, metadata, name))
        except UsageError as error:
            raise to_api_error(error, "name") from None
        except FledgeError as error:
            raise ApiError(507, str(error), code="no_space") from None

    def encode_state(self, state: State, metadata: StateMetadata) -> str:
        """A signed state file in base64, which the client stores itself."""
        return base64.b64encode(encode_state(state, metadata, self.secret)).decode()

    def make_handle(self, tenant: Tenant, id: str) -> str:
        """The handle of a saved state: its id, signed for its owner."""
        return f"{id}.{self._sign_id(tenant, id)}"

    def parse_handle(self, tenant: Tenant, handle: str, param: str) -> str:
        """The id of a handle. Raises ApiError 404 if the handle was not made for this tenant."""
        id, _, signature = handle.partition(".")
        if not hmac.compare_digest(signature.encode(), self._sign_id(tenant, id).encode()):
            raise ApiError(404, "there is no such state", param=param, code="state_not_found")
        return id

    def _sign_id(self, tenant: Tenant, id: str) -> str:
        text = f"{self.get_owner(tenant)}\0{id}".encode()
        digest = hmac.new(self.secret, text, hashlib.sha256).digest()[:12]
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    def require_state_store(self, param: str = "fledge") -> StateStore | SharedStateStore:
        """The state store. Raises ApiError 400 for `param` if the server has none."""
        if self.state_store is None:
            raise ApiError(400, "this server does not save states: start it with --folder", param=param)
        return self.state_store

    @asynccontextmanager
    async def lock_session(self, tenant: Tenant, name: str) -> AsyncIterator[str | None]:
        """Lock a session for one request. Yields the handle of its current state, or None for a new session.

        Raises ApiError 409 if it is locked.
        """
        key = (self.get_owner(tenant), name)
        if key in self._locked_sessions:
            message = f"session {name!r} is answering another request; wait until it has ended"
            raise ApiError(409, message, param="fledge.session")
        self._locked_sessions[key] = None
        try:
            store = self.require_state_store("fledge.session")
            id = self._locked_sessions[key] = await asyncio.to_thread(store.current_state, *key)
            yield None if id is None else self.make_handle(tenant, id)
        finally:
            del self._locked_sessions[key]

    async def update_session(self, tenant: Tenant, session: str, handle: str) -> None:
        """Set the current state of a locked session. Raises ApiError 409 if another server has changed it meanwhile."""
        key, id = (self.get_owner(tenant), session), handle.partition(".")[0]
        store = self.require_state_store("fledge.session")
        try:
            await asyncio.to_thread(partial(store.compare_and_set, *key, id, expected=self._locked_sessions[key]))
        except SessionConflict as error:
            message = f"{error}, possibly by another server; this answer was not saved; send the request again"
            raise ApiError(409, message, param="fledge.session") from None
        except UsageError as error:
            raise to_api_error(error, "fledge.session") from None
        except FledgeError as error:
            raise ApiError(507, str(error), code="no_space") from None
        self._locked_sessions[key] = id

    def _schedule_delivery(self) -> None:
        """Wake the event loop. Called in the engine's thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver_events)
        except RuntimeError:  # the loop is closed, so nothing reads events any more
            return

    def _deliver_events(self) -> None:
        """Move events from the engine into the queues of their requests."""
        assert self._loop is not None
        if self._delivery_timer is not None:
            self._delivery_timer.cancel()
        events = self.async_engine.drain_events()
        self._delivery_timer = self._loop.call_later(2 * FLUSH_INTERVAL, self._deliver_events) if events else None
        for request, event in events:
            queue = self._queues.get(request)
            if queue is not None:
                queue.put(event)


def get_service(request: HttpRequest) -> Service:
    """The service of the application."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def _describe_arithmetic(llm: LLM) -> str:
    """Everything besides the weights that affects the exact bits of a state. Other snapshots are not used."""
    backend = f"native {instruction_set()}" if isinstance(llm.model, NativeModel) else f"torch {torch.__version__}"
    return f"{llm.weights} {llm.device.type} {backend}"


def read_secret(settings: ServerSettings) -> bytes:
    """The secret that signs states: from a file, created on first use, or random if the server has no file for it."""
    path = (
        settings.secret
        or (settings.shared and settings.shared / "secret")
        or (settings.folder / "secret" if settings.folder is not None else None)
    )
    if path is None:
        return secrets.token_bytes(MIN_SECRET_BYTES)
    try:
        secret = read_or_create_secret(path, secrets.token_hex(MIN_SECRET_BYTES).encode()).strip()
    except OSError as error:
        raise FledgeError(f"{path}, the secret that signs states, cannot be used: {error.strerror}") from None
    if len(secret) < MIN_SECRET_BYTES:
        message = (
            f"{path} is too short for a secret: it needs at least {MIN_SECRET_BYTES} bytes; delete it to get a new one"
        )
        raise FledgeError(message)
    return secret
