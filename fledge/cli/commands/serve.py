"""`fledge serve`: serve a model over HTTP, with a web page for chats."""

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
    """Where the server listens, where it stores data, and who can use it."""

    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="NUMBER", help="Port. 0: any free port.")] = 8000
    folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Saved states and the cache. Without it, nothing outlives the server."),
    ] = None
    shared: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Saved states, shared with other servers.")] = (
        None
    )
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="API keys (TOML, see docs/server.md).")] = None
    secret: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Signs states; created if it does not exist. (default: a file in FOLDER)"),
    ] = None
    origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Origin of a web page that may call the server; repeatable.")
    ] = None
    log: Annotated[bool, typer.Option("--log", help="Write one line per request.")] = False


@dataclass(frozen=True)
class ServerLimits:
    """Limits of the server."""

    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the model. (default: its file name)")] = None
    slots: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Sequences in a batch.")] = (
        ServerSettings.slots
    )
    queue: Annotated[int, typer.Option(min=1, metavar="N", help="Requests that are queued or running.")] = (
        ServerSettings.max_requests
    )
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=ServerSettings.max_tokens_limit,
            metavar="N",
            help="Tokens of a completion if the request gives no limit.",
        ),
    ] = ServerSettings.default_max_tokens
    cache_memory: Annotated[int, typer.Option(min=0, metavar="MB", help="Prefix cache in memory.")] = (
        ServerSettings.cache_memory // MB
    )
    cache_disk: Annotated[int, typer.Option(min=0, metavar="MB", help="Prefix cache on disk, in FOLDER.")] = (
        ServerSettings.cache_disk // MB
    )
    state_storage: Annotated[int, typer.Option(min=1, metavar="MB", help="Saved states on disk.")] = (
        ServerSettings.state_storage // MB
    )
    drain: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Time for running requests when the server stops.")
    ] = ServerSettings.drain_seconds
    replicas: Annotated[
        int, typer.Option(min=0, metavar="N", help="Replicas on a Ray cluster. 0: one server without Ray.")
    ] = 0


@app.command()
@spread
def serve(model: ModelOptions, listen: ListenOptions, limits: ServerLimits) -> None:
    """Serve a model with the OpenAI API, and a web page for chats.

    Listens on this machine only unless --host is given; with --host, also give --keys. Ctrl-C or SIGTERM stops the
    server after the running requests; a second one stops it immediately.
    """
    _check_installed()
    _check_options(listen)
    settings = ServerSettings(
        name=limits.name,
        folder=listen.folder,
        shared=listen.shared,
        keys=listen.keys,
        secret=listen.secret,
        slots=limits.slots,
        max_requests=limits.queue,
        default_max_tokens=limits.max_tokens,
        cache_memory=limits.cache_memory * MB,
        cache_disk=limits.cache_disk * MB,
        state_storage=limits.state_storage * MB,
        origins=tuple(listen.origin or ()),
        drain_seconds=limits.drain,
    )
    if limits.replicas:
        _run_replicas(model, settings, listen, limits.replicas)
    else:
        _run(model, settings, listen)


def _check_options(listen: ListenOptions) -> None:
    from fledge.server.middleware import is_local

    for option, folder in (("--folder", listen.folder), ("--shared", listen.shared)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UsageError(f"{option}: {folder} is not a folder")
    for origin in listen.origin or ():
        if not ORIGIN.fullmatch(origin):
            raise UsageError(f"--origin {origin}: give only scheme, host and port, such as https://chat.example:8443")
    if listen.secret is not None and not listen.secret.exists():
        print_terminal_note(f"--secret: {listen.secret} does not exist and will be created")
    if not is_local(listen.host) and listen.keys is None:
        print_terminal_note(f"everyone who can reach {listen.host} can use this server, because it has no --keys")


def _run(model: ModelOptions, settings: ServerSettings, listen: ListenOptions) -> None:
    import uvicorn

    from fledge.server.app import create_app
    from fledge.server.service import Service

    llm = model.load()
    service = Service(llm, settings, llm.identity)
    config = uvicorn.Config(
        create_app(service, listen.host),
        log_level="warning",
        ws="none",
        access_log=listen.log,
        # Longer than the engine's own limit, which ends every request with an error response.
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + 2,
        server_header=False,
    )
    if listen.log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    gc.collect()
    gc.freeze()  # the objects created so far stay, so the garbage collector need not scan them repeatedly
    listener = _listen(listen.host, listen.port)
    _print_address(service.model_name, listen.host, listener.getsockname()[1])
    try:
        _create_server(config, service).run(sockets=[listener])
    finally:  # after a second signal, a thread that still computes could crash the interpreter at exit
        service.async_engine.close()


def _create_server(config: Any, service: Any) -> Any:
    """A server that a second signal stops immediately. Requests that this aborts are not logged as errors."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if count := len(self.server_state.tasks):
                drain, requests = service.settings.drain_seconds, "1 request" if count == 1 else f"{count} requests"
                print_terminal_note(
                    f"finishing {requests} for up to {drain:g} s; press Ctrl-C again to stop immediately"
                )
                asyncio.get_running_loop().call_later(drain, service.async_engine.begin_shutdown)
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            is_second = self.should_exit
            super().handle_exit(sig, frame)
            self.force_exit = is_second

        def is_logged(self, record: logging.LogRecord) -> bool:
            is_cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
            return not (is_cancelled or self.force_exit)

    server = Server(config)
    logging.getLogger("uvicorn.error").addFilter(server.is_logged)
    return server


def _run_replicas(model: ModelOptions, settings: ServerSettings, listen: ListenOptions, num_replicas: int) -> None:
    if settings.folder is not None or settings.shared is None:
        raise UsageError("replicas need a folder for states that all of them share: give --shared FOLDER, not --folder")
    if listen.log:
        raise UsageError("--log: replicas are logged by Ray; leave this option out")
    from fledge.server.replicas import run

    read_adapters(model.adapter or (), model.alpha, model.any_base)  # reports errors once instead of in every replica
    load_arguments = {
        "name_or_path": model.model,
        "device": model.device,
        "dtype": model.dtype,
        "quant": model.quant,
        "adapter": tuple(model.adapter or ()),
        "alpha": model.alpha,
        "any_base": model.any_base,
    }
    host, port = listen.host, listen.port
    run(load_arguments, settings, num_replicas, host, port, lambda name: _print_address(name, host, port))


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # clients may connect as soon as the address is printed
    except OSError as error:
        listener.close()
        # EADDRNOTAVAIL: not an address of this machine. gaierror: not an address.
        is_host_wrong = error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror)
        option = "--host" if is_host_wrong else "--port"
        raise FledgeError(f"cannot bind to {host}:{port}: {error.strerror}; choose another {option}") from None
    return listener


def _print_address(name: str, host: str, port: int) -> None:
    """Print one line that programs can parse. It is printed even if standard error is not a terminal."""
    shown_host = f"[{host}]" if ":" in host else host
    typer.echo(f"{name} at http://{shown_host}:{port}  (chat page; OpenAI clients: add /v1)", err=True)


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f'the server needs {error.name}; install it with: pip install "fledge[serve]"') from None
