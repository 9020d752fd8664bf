"""Who runs a stage: this process, several here, or Ray on many machines (rays.py). All run the same functions.

A stage function takes a job and one task, and leaves files behind; it returns nothing, so nothing large travels between
processes. A worker whose parent is killed ends with the task in hand: the pipe it waits on is closed then.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol

from fledge.core.errors import DataError, FledgeError
from fledge.data.pipeline.stage_outputs import StageContext

Function = Callable[[StageContext, Any], None]


class Workers(Protocol):
    """Runs the tasks of a stage."""

    def run(self, function: Function, job: StageContext, tasks: Sequence[Any]) -> Iterator[None]:
        """Yields once for each task that is done, in any order. The first error ends it."""


class InlineWorkers:
    """One after the other, in this process."""

    def run(self, function: Function, job: StageContext, tasks: Sequence[Any]) -> Iterator[None]:
        """Yields after each task."""
        for task in tasks:
            function(job, task)
            yield None


class ProcessWorkers:
    """Several processes on this machine, started once for all stages."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._running: dict[Connection, Any] = {}

    def __enter__(self) -> ProcessWorkers:
        # Not forked: a fork inherits locks that threads of this process (a progress bar's, numpy's) may hold.
        context = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._running[ours] = process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection, process in self._running.items():
            connection.close()
            if kind is not None:
                process.terminate()
            process.join()
        self._running = {}

    def run(self, function: Function, job: StageContext, tasks: Sequence[Any]) -> Iterator[None]:
        """Each process gets its next task when it is done with one."""
        left = iter(tasks)
        busy = [connection for connection in self._running if self._send(connection, function, job, left)]
        while busy:
            for ready in wait(busy):
                assert isinstance(ready, Connection)
                try:
                    error = ready.recv()
                except (EOFError, OSError):
                    raise self._died(ready) from None
                if error is not None:
                    raise error if isinstance(error, FledgeError | OSError) else RuntimeError(error)
                yield None
                if not self._send(ready, function, job, left):
                    busy.remove(ready)

    def _send(self, connection: Connection, function: Function, job: StageContext, left: Iterator[Any]) -> bool:
        """Give a process its next task; False where none is left."""
        for task in left:
            try:
                connection.send((function, job, task))
            except OSError:
                raise self._died(connection) from None
            return True
        return False

    def _died(self, connection: Connection) -> DataError:
        process = self._running[connection]
        process.join()
        return DataError(
            f"a worker process ended by itself (exit code {process.exitcode}); if memory ran out, use fewer --workers. "
            "Finished pieces are kept: run the same command again"
        )


def _serve(connection: Connection) -> None:
    """A worker's life: tasks come, None or an error goes back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    while True:
        try:
            function, job, task = connection.recv()
        except (EOFError, OSError):  # the build has ended, or was killed
            return
        error: Any = None
        try:
            function(job, task)
        except (FledgeError, OSError) as caught:
            error = caught
        except Exception:
            error = traceback.format_exc()
        try:
            connection.send(error)
        except OSError:
            return
