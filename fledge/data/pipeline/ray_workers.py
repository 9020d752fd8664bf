"""Run the stages of a build on Ray Data, for corpora larger than one machine.

The stage functions are those of workers.py. Stages exchange files, so every machine of the cluster must have the
sources and the store's folder under the same paths (a shared file system).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from fledge.core import errors
from fledge.core.errors import FledgeError, UsageError
from fledge.data.pipeline.stage_outputs import StageContext
from fledge.data.pipeline.workers import StageFunction


class RayWorkers:
    """Runs tasks as the rows of a Ray data set, on the configured cluster (such as RAY_ADDRESS) or a local one."""

    def __enter__(self) -> RayWorkers:
        try:
            import ray
            import ray.data
        except ImportError:
            raise UsageError('--ray needs the package ray: pip install "fledge[ray]"') from None
        self._ray = ray
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owns_cluster:
            self._ray.shutdown()

    def run(self, function: StageFunction, context: StageContext, tasks: Sequence[Any]) -> Iterator[None]:
        """Run one row for each task. An error is returned as the result of its row and raised here."""
        if not tasks:
            return
        rows = [{"task": task} for task in tasks]
        dataset = self._ray.data.from_items(rows, override_num_blocks=len(rows))

        def run_task(row: dict[str, Any]) -> dict[str, Any]:
            try:
                function(context, row["task"])
            except FledgeError as error:
                return {"kind": type(error).__name__, "message": str(error), "code": 0}
            except OSError as error:
                return {"kind": "OSError", "message": str(error.strerror or error), "code": error.errno or 0}
            return {"kind": "", "message": "", "code": 0}

        for row in dataset.map(run_task).iter_rows():
            if row["kind"]:
                raise _make_error(**row)
            yield None


def _make_error(kind: str, message: str, code: int) -> Exception:
    """The error of a task from its serialized form."""
    return OSError(code, message) if kind == "OSError" else getattr(errors, kind, FledgeError)(message)
