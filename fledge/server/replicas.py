"""Past one machine: the same app as a Ray Serve deployment, in as many copies as wanted.

Each copy loads the model and has an engine and a cache of its own. What is kept on purpose lies in a folder that all of
them see, signed (fledge.engine.states.shared_store), so any copy answers for any other: one that dies takes the texts
along that it
was writing, and no conversation. Ray starts another in its place.
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


def build(arguments: dict[str, Any], settings: ServerSettings, host: str) -> FastAPI:
    """The app of one copy, made where the copy runs."""
    llm = _loaded(**arguments)
    return create_app(Service(llm, settings, llm.identity), host)


def _loaded(adapter: Sequence[str] = (), alpha: float | None = None, any_base: bool = False, **more: Any) -> LLM:
    """The adapters are read here: as files they are smaller than in what Ray hands to a copy."""
    return load(adapter=read_adapters(adapter, alpha=alpha, any_base=any_base), **more)


def application(
    arguments: dict[str, Any], settings: ServerSettings, replicas: int, cpus: float = 1.0, host: str = "127.0.0.1"
) -> Any:
    """What `ray.serve.run` takes.

    arguments: of `fledge.load`; `adapter` is a list of files, with `alpha` and `any_base` as on the command line.
    cpus: that Ray reserves for each copy. host: as for `create_app`, where Ray's proxy listens.
    """
    serve = _serve()
    if settings.shared is None:
        raise UsageError("copies of a server need a folder that all of them see (Settings.shared)")
    shared = settings.shared.resolve()
    settings = replace(settings, folder=None, shared=shared, secret=(settings.secret or shared / "secret").resolve())
    read_secret(settings)  # made here, once, and not by every copy

    def app() -> FastAPI:  # Ray wants a function, not a partial one
        return build(arguments, settings, host)

    @serve.deployment(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.drain,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )
    @serve.ingress(app)
    class Fledge:
        """One copy."""

    copies: Any = Fledge
    return copies.bind()


def run(
    arguments: dict[str, Any],
    settings: ServerSettings,
    replicas: int,
    host: str,
    port: int,
    ready: Callable[[str], None],
) -> None:
    """Serve on the Ray cluster that `RAY_ADDRESS` names, else on one started here, until an interrupt."""
    serve = _serve()
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": host, "port": port})
    cpus = min(1.0, ray.cluster_resources().get("CPU", 1.0) / (replicas + 1))
    try:
        serve.run(application(arguments, settings, replicas, cpus, host), name="fledge", route_prefix="/")
    except RuntimeError as error:
        raise FledgeError(f"Ray could not start {replicas} copies: {error}") from None
    source = arguments.get("name_or_path")
    ready(settings.name or (Path(source).stem if source else "tiny-finch"))
    try:
        while True:
            time.sleep(3600)
    finally:
        serve.shutdown()
        ray.shutdown()


def _serve() -> Any:
    try:
        from ray import serve
    except ImportError:
        raise UsageError(
            'copies of a server need Ray Serve; install it with: pip install "fledge[serve,ray]"'
        ) from None
    return serve
