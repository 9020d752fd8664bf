"""Run the tasks of a stage in this process or in several processes. ray_workers.py runs them on many machines.

A stage function takes the context and one task. It writes files and returns nothing, so that no large data is sent
between processes. If the parent is killed, a worker finishes its current task and ends, because its pipe is closed.
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

StageFunction = Callable[[StageContext, Any], None]


class Workers(Protocol):
    """Runs the tasks of a stage."""

    def run(self, function: StageFunction, context: StageContext, tasks: Sequence[Any]) -> Iterator[None]:
        """Yield once for each finished task, in any order. Raises the first error."""


class InlineWorkers:
    """Runs tasks in this process, one after the other."""

    def run(self, function: StageFunction, context: StageContext, tasks: Sequence[Any]) -> Iterator[None]:
        """Yield after each task."""
        for task in tasks:
            function(context, task)
            yield None


class ProcessWorkers:
    """Runs tasks in several processes on this machine, started once for all stages."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._processes: dict[Connection, Any] = {}

    def __enter__(self) -> ProcessWorkers:
        # Not "fork": it copies locks that threads of this process (of a progress bar or numpy) may hold.
        spawn = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            parent_end, child_end = spawn.Pipe()
            process = spawn.Process(target=_serve_tasks, args=(child_end,), daemon=True)
            process.start()
            child_end.close()
            self._processes[parent_end] = process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection, process in self._processes.items():
            connection.close()
            if kind is not None:
                process.terminate()
            process.join()
        self._processes = {}

    def run(self, function: StageFunction, context: StageContext, tasks: Sequence[Any]) -> Iterator[None]:
        """Send each process its next task when it finishes one."""
        pending = iter(tasks)
        busy = [connection for connection in self._processes if self._send(connection, function, context, pending)]
        while busy:
            for ready in wait(busy):
                assert isinstance(ready, Connection)
                try:
                    error = ready.recv()
                except (EOFError, OSError):
                    raise self._make_crash_error(ready) from None
                if error is not None:
                    raise error if isinstance(error, FledgeError | OSError) else RuntimeError(error)
                yield None
                if not self._send(ready, function, context, pending):
                    busy.remove(ready)

    def _send(
        self, connection: Connection, function: StageFunction, context: StageContext, pending: Iterator[Any]
    ) -> bool:
        """Send a process its next task. Returns False if there is none."""
        for task in pending:
            try:
                connection.send((function, context, task))
            except OSError:
                raise self._make_crash_error(connection) from None
            return True
        return False

    def _make_crash_error(self, connection: Connection) -> DataError:
        process = self._processes[connection]
        process.join()
        return DataError(
            f"a worker process crashed (exit code {process.exitcode}); if memory ran out, use fewer --workers. "
            "Finished parts are kept: run the same command again"
        )


def _serve_tasks(connection: Connection) -> None:
    """The main function of a worker: receive tasks, and send None or an error for each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    while True:
        try:
            function, context, task = connection.recv()
        except (EOFError, OSError):  # the build ended or was killed
            return
        error: Any = None
        try:
            function(context, task)
        except (FledgeError, OSError) as caught:
            error = caught
        except Exception:
            error = traceback.format_exc()
        try:
            connection.send(error)
        except OSError:
            return
