"""The service itself, without HTTP: what it hands on, and where that is."""

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
from running import IDENTITY, fake, random_model

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
def serviced(llm: LLM, **settings: Any) -> Iterator[Service]:
    """A service that answers nobody; it has stopped when this is left."""
    made = Service(llm, replace(ServerSettings(cache_memory=1 << 24), **settings), IDENTITY)
    try:
        yield made
    finally:
        asyncio.run(made.stop())


def test_states_come_where_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = random_model()
    with serviced(replace(llm, initial_state=make_initial_state(llm.model)), folder=tmp_path) as made:
        tenant, state = made.keys.authenticate(None), make_initial_state(llm.model)
        handle = asyncio.run(made.save_state(tenant, state, made.make_metadata(3, None)))
        inline = made.encode_state(state, made.make_metadata(3, None))
        monkeypatch.setattr(LLM, "device", torch.device("meta"))
        found = [made.initial_state, *(asyncio.run(made.load_state(tenant, text))[0] for text in (handle, inline))]
        assert {tensor.device.type for each in found for tensor in each.tensors().values()} == {"meta"}


def test_the_cache_of_a_folder_knows_what_texts_begin_from(tmp_path: Path) -> None:
    """A tuned initial state, which is no part of the weights' identity."""
    llm, path = random_model(), pack_ids(range(40))
    plain = make_initial_state(llm.model)
    tuned = type(plain)(**{name: tensor + 1 for name, tensor in plain.tensors().items()})
    with serviced(replace(llm, initial_state=tuned), folder=tmp_path) as made:
        assert made.disk_cache is not None
        made.disk_cache.put("\0", path, Snapshot(tuned, None))
    for start, known in ((None, False), (plain, False), (tuned, True)):
        with serviced(replace(llm, initial_state=start), folder=tmp_path) as made:
            assert (
                made.disk_cache is not None
                and (made.disk_cache.find_longest("\0", path + path, 1) is not None) == known
            )


def test_servers_that_start_together_sign_alike_and_for_themselves(tmp_path: Path) -> None:
    settings = ServerSettings(shared=tmp_path / "shared")
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: read_secret(settings), range(8)))
    path = tmp_path / "shared" / "secret"
    assert found == {path.read_bytes()}
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(FledgeError, match="must hold at least 32 bytes; remove it"):
        read_secret(settings)
    path.unlink()
    path.mkdir()
    with pytest.raises(FledgeError, match="the secret that signs states, cannot be used"):
        read_secret(settings)


def test_the_event_loop_waits_for_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = list[str]()

    def noted(function: Any) -> Any:
        return lambda *arguments: (threads.append(threading.current_thread().name), function(*arguments))[1]

    with serviced(fake("a"), folder=tmp_path) as made:
        tenant, state, card = made.keys.authenticate(None), made.initial_state, made.make_metadata(3, None)
        handle, inline = asyncio.run(made.save_state(tenant, state, card)), made.encode_state(state, card)
        monkeypatch.setattr(StateStore, "describe", noted(StateStore.describe))
        monkeypatch.setattr("fledge.server.service.decode_state", noted(decode_state))
        for text in (handle, inline):
            found, _ = asyncio.run(made.load_state(tenant, text))
            assert isinstance(found, State)
    assert len(threads) == 3 and threading.main_thread().name not in threads
