"""`fledge serve`: the model behind HTTP, with the chat page."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import math
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from fledge.cli.options import ModelOptions, read_adapters, spread
from fledge.cli.terminal import print_terminal_note
from fledge.core.errors import FledgeError, UsageError
from fledge.server.settings import MB, ServerSettings

app = typer.Typer(name="serve", add_completion=False)

ORIGIN = re.compile(r"https?://[^/\s]+")


@dataclass(frozen=True)
class ListenOptions:
    """Where the server listens, and what it keeps where."""

    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="NUMBER", help="0 takes a free one.")] = 8000
    folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For kept states and the cache; without it nothing outlives the server."),
    ] = None
    shared: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For kept states, together with other servers.")
    ] = None
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="Who may ask (TOML, see docs/server.md).")] = None
    secret: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Signs states; made where it is not there. (default: one in FOLDER)"),
    ] = None
    origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A web page elsewhere that may call; several times.")
    ] = None
    log: Annotated[bool, typer.Option("--log", help="Write a line for every request.")] = False


@dataclass(frozen=True)
class ServerLimits:
    """How much the server does at once, and holds."""

    name: Annotated[str | None, typer.Option(metavar="NAME", help="What the model is called. (default: its file)")] = (
        None
    )
    slots: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Texts computed at once.")] = (
        ServerSettings.slots
    )
    queue: Annotated[int, typer.Option(min=1, metavar="N", help="Requests on their way at once.")] = (
        ServerSettings.queue
    )
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1, max=ServerSettings.most_tokens, metavar="N", help="Of an answer, where the request names no number."
        ),
    ] = ServerSettings.max_tokens
    cache_memory: Annotated[int, typer.Option(min=0, metavar="MB", help="For states of known beginnings.")] = (
        ServerSettings.cache_memory // MB
    )
    cache_disk: Annotated[int, typer.Option(min=0, metavar="MB", help="The same on disk, in FOLDER.")] = (
        ServerSettings.cache_disk // MB
    )
    shelf: Annotated[int, typer.Option(min=1, metavar="MB", help="For states that were asked to be kept.")] = (
        ServerSettings.shelf // MB
    )
    drain: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="For requests under way when the server stops.")
    ] = ServerSettings.drain
    replicas: Annotated[
        int, typer.Option(min=0, metavar="N", help="Copies on a Ray cluster; 0: one server, here, without Ray.")
    ] = 0


@app.command()
@spread
def serve(model: ModelOptions, place: ListenOptions, limits: ServerLimits) -> None:
    """Serve a model to OpenAI's clients, and the chat page to browsers.

    Listens on this machine only unless --host says otherwise; then give --keys too. Ctrl-C, or SIGTERM, ends it after
    the requests under way; a second one ends it at once.
    """
    _installed()
    from fledge.server.host_check import is_local

    for option, folder in (("--folder", place.folder), ("--shared", place.shared)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UsageError(f"{option}: {folder} is not a folder")
    for origin in place.origin or ():
        if not ORIGIN.fullmatch(origin):
            raise UsageError(f"--origin {origin}: give scheme, name and port only, as https://chat.example:8443")
    if place.secret is not None and not place.secret.exists():
        print_terminal_note(f"--secret: {place.secret} is not there; a new one is made")
    if not is_local(place.host) and place.keys is None:
        print_terminal_note(f"anybody who reaches {place.host} can use this server: it has no --keys")
    settings = ServerSettings(
        name=limits.name,
        folder=place.folder,
        shared=place.shared,
        keys=place.keys,
        secret=place.secret,
        slots=limits.slots,
        queue=limits.queue,
        max_tokens=limits.max_tokens,
        cache_memory=limits.cache_memory * MB,
        cache_disk=limits.cache_disk * MB,
        shelf=limits.shelf * MB,
        origins=tuple(place.origin or ()),
        drain=limits.drain,
    )
    if limits.replicas:
        _spread(model, settings, place, limits.replicas)
    else:
        _run(model, settings, place)


def _run(model: ModelOptions, settings: ServerSettings, place: ListenOptions) -> None:
    import uvicorn

    from fledge.server.app import create_app
    from fledge.server.service import Service

    llm = model.load()
    service = Service(llm, settings, llm.identity)
    config = uvicorn.Config(
        create_app(service, place.host),
        log_level="warning",
        ws="none",
        access_log=place.log,
        # The desk gives up before: then every client is told so.
        timeout_graceful_shutdown=math.ceil(settings.drain) + 2,
        server_header=False,
    )
    if place.log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    gc.collect()
    gc.freeze()  # what is here now stays: the collector need not look through it again and again
    listener = _listening(place.host, place.port)
    _announce(service.name, place.host, listener.getsockname()[1])
    try:
        _stoppable(config, service).run(sockets=[listener])
    finally:  # where it was stopped twice, a thread that still computes could crash the interpreter as it ends
        service.desk.close()


def _stoppable(config: Any, service: Any) -> Any:
    """The server, which a second signal ends at once. What is broken off then has no error to tell of."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if count := len(self.server_state.tasks):
                drain, requests = service.settings.drain, "1 request" if count == 1 else f"{count} requests"
                print_terminal_note(f"finishing {requests}, for up to {drain:g} s; Ctrl-C again breaks off")
                asyncio.get_running_loop().call_later(drain, service.desk.wind_up)
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            again = self.should_exit
            super().handle_exit(sig, frame)
            self.force_exit = again

        def told(self, record: logging.LogRecord) -> bool:
            stopped = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
            return not (stopped or self.force_exit)

    server = Server(config)
    logging.getLogger("uvicorn.error").addFilter(server.told)
    return server


def _spread(model: ModelOptions, settings: ServerSettings, place: ListenOptions, count: int) -> None:
    if settings.folder is not None or settings.shared is None:
        raise UsageError("copies keep states where all of them see them: give --shared FOLDER and no --folder")
    if place.log:
        raise UsageError("--log: copies write no lines of their own, Ray does; leave it out")
    from fledge.server.replicas import run

    read_adapters(model.adapter or (), model.alpha, model.any_base)  # a mistake is told here, not by every copy
    arguments = {
        "name_or_path": model.model,
        "device": model.device,
        "dtype": model.dtype,
        "quant": model.quant,
        "adapter": tuple(model.adapter or ()),
        "alpha": model.alpha,
        "any_base": model.any_base,
    }
    run(arguments, settings, count, place.host, place.port, lambda name: _announce(name, place.host, place.port))


def _listening(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # whoever waits for the line that tells the address may call at once
    except OSError as error:
        listener.close()
        # EADDRNOTAVAIL: no address of this machine; gaierror: no address at all.
        other = "--host" if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror) else "--port"
        raise FledgeError(f"{host}:{port} cannot be listened at: {error.strerror}; choose another {other}") from None
    return listener


def _announce(name: str, host: str, port: int) -> None:
    """One line that programs can read too: it is written whether or not somebody looks at a terminal."""
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"{name} at http://{shown}:{port}  (the chat page; for OpenAI's clients add /v1)", err=True)


def _installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f'the server needs {error.name}; install it with: pip install "fledge[serve]"') from None
