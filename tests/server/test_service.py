"""The service without HTTP: states, the prefix cache on disk and the secret."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import IDENTITY, random_llm, scripted_llm

from fledge.core.errors import FledgeError
from fledge.engine.generation import make_initial_state
from fledge.engine.llm.llm import LLM
from fledge.engine.prefix_cache.disk_store import Snapshot
from fledge.engine.prefix_cache.radix_tree import pack_ids
from fledge.engine.states.state_file import decode_state
from fledge.engine.states.store import StateStore
from fledge.models.state import State
from fledge.server.service import Service, read_secret
from fledge.server.settings import ServerSettings


@contextmanager
def create_service(llm: LLM, **settings: Any) -> Iterator[Service]:
    """A service without a server, stopped at the end."""
    service = Service(llm, replace(ServerSettings(cache_memory=1 << 24), **settings), IDENTITY)
    try:
        yield service
    finally:
        asyncio.run(service.stop())


def test_states_are_loaded_on_the_device_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = random_llm()
    with create_service(replace(llm, initial_state=make_initial_state(llm.model)), folder=tmp_path) as service:
        tenant, state = service.keys.authenticate(None), make_initial_state(llm.model)
        metadata = service.make_metadata(3, None)
        handle = asyncio.run(service.save_state(tenant, state, metadata))
        inline = service.encode_state(state, metadata)
        monkeypatch.setattr(LLM, "device", torch.device("meta"))
        loaded = [asyncio.run(service.load_state(tenant, text)).state for text in (handle, inline)]
        states = [service.initial_state, *loaded]
        assert {tensor.device.type for each in states for tensor in each.tensors().values()} == {"meta"}


def test_the_cache_on_disk_depends_on_the_initial_state(tmp_path: Path) -> None:
    """A tuned initial state is not part of the identity of the weights."""
    llm, path = random_llm(), pack_ids(range(40))
    zero = make_initial_state(llm.model)
    tuned = type(zero)(**{name: tensor + 1 for name, tensor in zero.tensors().items()})
    with create_service(replace(llm, initial_state=tuned), folder=tmp_path) as service:
        assert service.disk_cache is not None
        service.disk_cache.put("\0", path, Snapshot(tuned, None))
    for initial_state, is_cached in ((None, False), (zero, False), (tuned, True)):
        with create_service(replace(llm, initial_state=initial_state), folder=tmp_path) as service:
            assert service.disk_cache is not None
            assert (service.disk_cache.find_longest("\0", path + path, 1) is not None) == is_cached


def test_servers_that_start_concurrently_create_one_private_secret(tmp_path: Path) -> None:
    settings = ServerSettings(shared=tmp_path / "shared")
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: read_secret(settings), range(8)))
    path = tmp_path / "shared" / "secret"
    assert secrets == {path.read_bytes()}
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(FledgeError, match="needs at least 32 bytes; delete it"):
        read_secret(settings)
    path.unlink()
    path.mkdir()
    with pytest.raises(FledgeError, match="the secret that signs states, cannot be used"):
        read_secret(settings)


def test_states_are_loaded_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = list[str]()

    def watch(function: Any) -> Any:
        def watched(*arguments: Any) -> Any:
            threads.append(threading.current_thread().name)
            return function(*arguments)

        return watched

    with create_service(scripted_llm("a"), folder=tmp_path) as service:
        tenant, state, metadata = service.keys.authenticate(None), service.initial_state, service.make_metadata(3, None)
        handle = asyncio.run(service.save_state(tenant, state, metadata))
        inline = service.encode_state(state, metadata)
        monkeypatch.setattr(StateStore, "describe", watch(StateStore.describe))
        monkeypatch.setattr("fledge.server.service.decode_state", watch(decode_state))
        for text in (handle, inline):
            assert isinstance(asyncio.run(service.load_state(tenant, text)).state, State)
    assert len(threads) >= 2 and threading.main_thread().name not in threads
