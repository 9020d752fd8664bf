"""The stages of a build on Ray Data, for corpora larger than one machine.

The same stage functions run as in workers.py. Every machine of the cluster must see the sources and the store's folder
under the same paths (a shared file system), since stages leave files for each other. Here: handing tasks to Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from fledge.core import errors
from fledge.core.errors import FledgeError, UsageError
from fledge.data.pipeline.stage_outputs import StageContext
from fledge.data.pipeline.workers import Function


class RayWorkers:
    """Tasks as the rows of a Ray data set. Uses the cluster that RAY_ADDRESS or the machine names, or a local one."""

    def __enter__(self) -> RayWorkers:
        try:
            import ray
            import ray.data
        except ImportError:
            raise UsageError('--ray needs the package ray: pip install "fledge[ray]"') from None
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            self._ray.shutdown()

    def run(self, function: Function, job: StageContext, tasks: Sequence[Any]) -> Iterator[None]:
        """One row a task; an error comes back as the row's result, as it was raised."""
        if not tasks:
            return
        rows = [{"task": task} for task in tasks]
        data = self._ray.data.from_items(rows, override_num_blocks=len(rows))

        def work(row: dict[str, Any]) -> dict[str, Any]:
            try:
                function(job, row["task"])
            except FledgeError as error:
                return {"kind": type(error).__name__, "message": str(error), "code": 0}
            except OSError as error:
                return {"kind": "OSError", "message": str(error.strerror or error), "code": error.errno or 0}
            return {"kind": "", "message": "", "code": 0}

        for row in data.map(work).iter_rows():
            if row["kind"]:
                raise _raised(**row)
            yield None


def _raised(kind: str, message: str, code: int) -> Exception:
    """The error of a task, on this side."""
    return OSError(code, message) if kind == "OSError" else getattr(errors, kind, FledgeError)(message)
