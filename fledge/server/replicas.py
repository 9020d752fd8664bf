"""Serving on several machines: the same app as a Ray Serve deployment with several replicas.

Each replica loads the model and has its own engine and prefix cache. Saved states are in a folder that all replicas
share, signed (`fledge.engine.states.shared_store`), so any replica can answer any request. If a replica crashes,
responses in flight are lost; saved conversations are not. Ray starts a new replica in its place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from fledge.checkpoint import read_adapters
from fledge.core.errors import FledgeError, UsageError
from fledge.engine.llm.llm import LLM
from fledge.engine.llm.loading import load
from fledge.server.app import create_app
from fledge.server.service import Service, read_secret
from fledge.server.settings import ServerSettings


def create_replica(load_arguments: dict[str, Any], settings: ServerSettings, host: str) -> FastAPI:
    """The app of one replica. Runs in the process of the replica."""
    llm = _load(**load_arguments)
    return create_app(Service(llm, settings, llm.identity), host)


def _load(
    adapter: Sequence[str] = (), alpha: float | None = None, any_base: bool = False, **load_arguments: Any
) -> LLM:
    """Load the model. Adapters are read here, because the files are smaller than what Ray would have to transfer."""
    return load(adapter=read_adapters(adapter, alpha=alpha, any_base=any_base), **load_arguments)


def create_deployment(
    load_arguments: dict[str, Any],
    settings: ServerSettings,
    num_replicas: int,
    cpus: float = 1.0,
    host: str = "127.0.0.1",
) -> Any:
    """The application for `ray.serve.run`.

    load_arguments: of `fledge.load`; `adapter` is a list of files, with `alpha` and `any_base` as on the command line.
    cpus: reserved for each replica. host: the address that Ray's proxy listens on, as for `create_app`.
    """
    serve = _import_ray_serve()
    if settings.shared is None:
        raise UsageError("replicas need a folder that all of them share (ServerSettings.shared)")
    shared = settings.shared.resolve()
    settings = replace(settings, folder=None, shared=shared, secret=(settings.secret or shared / "secret").resolve())
    read_secret(settings)  # creates the file once, before the replicas start

    def create() -> FastAPI:  # Ray requires a function; a partial object is not accepted
        return create_replica(load_arguments, settings, host)

    @serve.deployment(
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=settings.max_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )
    @serve.ingress(create)
    class Fledge:
        """One replica."""

    deployment: Any = Fledge
    return deployment.bind()


def run(
    load_arguments: dict[str, Any],
    settings: ServerSettings,
    num_replicas: int,
    host: str,
    port: int,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until interrupted, on the Ray cluster named by `RAY_ADDRESS` or on a new local one.

    on_ready: called with the name of the model when the replicas answer requests.
    """
    serve = _import_ray_serve()
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": host, "port": port})
    cpus = min(1.0, ray.cluster_resources().get("CPU", 1.0) / (num_replicas + 1))
    try:
        deployment = create_deployment(load_arguments, settings, num_replicas, cpus, host)
        serve.run(deployment, name="fledge", route_prefix="/")
    except RuntimeError as error:
        raise FledgeError(f"Ray could not start {num_replicas} replicas: {error}") from None
    checkpoint = load_arguments.get("name_or_path")
    on_ready(settings.name or (Path(checkpoint).stem if checkpoint else "tiny-finch"))
    try:
        while True:
            time.sleep(3600)
    finally:
        serve.shutdown()
        ray.shutdown()


def _import_ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError:
        raise UsageError('--replicas needs Ray Serve; install it with: pip install "fledge[serve,ray]"') from None
    return serve
