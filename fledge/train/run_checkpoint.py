"""Checkpoints of a training run: weights, optimizer, step and the metrics of the next line.

    last.pt            one process, or ddp: one file that is replaced atomically
    last/step-000120   fsdp: a folder of torch.distributed.checkpoint with a part from every process; the older
                       folder is deleted when the newer one is complete

Only trained parameters are saved; those without a gradient are in the base model. The identity describes the run, so
that the weights of another run are rejected.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fledge.core.errors import CheckpointError, TrainingError
from fledge.core.files import add_path_to_errors, atomic_path, describe_disk_error
from fledge.train.distributed import Distributed, local_shard

FILE, FOLDER = "last.pt", "last"
COMPLETE_MARKER = "whole"  # the file that marks a folder as complete
ADVICE = "move it away to start again"

RENAMED_SETTINGS = {
    "through": "tbptt_windows",
    "peak": "max_lr",
    "final": "min_lr",
    "micro": "micro_batch_size",
    "borders": "reset_at_document",
    "recompute": "activation_checkpointing",
    "warmup": "warmup_steps",
}
"""Names of settings in checkpoints of earlier versions, which can still be resumed."""


class SaveError(TrainingError):
    """A checkpoint cannot be written, or must not be. The previous one is unchanged."""


class RunCheckpoint:
    """The checkpoint in the folder of a run. identity: plain values that must be the same when the run continues.

    `written` is the number of steps in the checkpoint; 0 without one.
    """

    def __init__(self, folder: Path, distributed: Distributed, identity: Mapping[str, Any]) -> None:
        self.folder, self.distributed, self.identity = folder, distributed, dict(identity)
        self.written = 0
        if distributed.is_main:
            for leftover in folder.glob(f".{FILE}.*.part"):  # of a process that was killed while it wrote
                leftover.unlink()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, metrics: dict[str, Any]) -> None:
        """Save the run after `step` steps, unless it is saved already. All processes must call this.

        metrics: the value of `MetricsLogger.pending()`.

        Raises SaveError if the weights are not finite or cannot be written; the previous checkpoint is then unchanged.
        """
        if step == self.written:
            return
        if not self._is_finite(model):
            start = f"continue from step {self.written}, the last good one:" if self.written else "start again:"
            raise SaveError(
                f"after step {step} the weights are not finite, so they are not saved; {start} use the same command "
                "with a lower learning rate, or see the published remedies for loss spikes (docs/guides/training.md)"
            )
        record = {"step": step, "identity": self.identity, "meter": metrics}
        failure: OSError | None = None
        try:
            if self.distributed.mode == "fsdp":
                self._save_shards(model, optimizer, step, record)
            elif self.distributed.is_main:
                tensors = {"model": trained_parameters(model), "optimizer": optimizer.state_dict()}
                with atomic_path(self.folder / FILE) as temporary:
                    torch.save({**record, **tensors}, temporary)
        except OSError as error:
            failure = error
        if self.distributed.largest(int(failure is not None)):  # otherwise the others would wait for a failed process
            raise self._describe_failure(failure)
        self.written = step

    def _describe_failure(self, error: OSError | None) -> SaveError:
        advice = f"the run continues from the previous checkpoint, of step {self.written}" if self.written else ""
        reason = "see the other processes" if error is None else describe_disk_error(error, self.folder, advice)
        return SaveError(f"the checkpoint in {self.folder} cannot be written: {reason}")

    def _is_finite(self, model: nn.Module) -> bool:
        """Whether all trained parameters are finite, in all processes."""
        finite = [local_shard(tensor).isfinite().all() for tensor in trained_parameters(model).values()]
        return not self.distributed.largest(int(not torch.stack(finite).all()))

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        """Load the checkpoint. Returns the number of completed steps (0 without a checkpoint) and the pending metrics.

        Raises CheckpointError for a damaged checkpoint and for one of another run.
        """
        resume = self._resume_shards if self.distributed.mode == "fsdp" else self._resume_file
        step, metrics = resume(model, optimizer)
        if step and not self._is_finite(model):
            raise CheckpointError(f"the checkpoint in {self.folder} contains weights that are not finite; {ADVICE}")
        self.written = step
        return step, metrics

    def _resume_file(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        path = self.folder / FILE
        if not path.exists():
            self._reject_if_present(self.folder / FOLDER, "was written by processes with fsdp")
            return 0, {}
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            self._check(path, saved)
            restore(model, saved["model"])
            with keep_settings(optimizer):
                optimizer.load_state_dict(saved["optimizer"])
            return int(saved["step"]), saved["meter"]
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file can cause any error in torch
            raise _damaged(path) from error

    def _save_shards(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, record: dict[str, Any]
    ) -> None:
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, not an Exception
        from torch.distributed.checkpoint.state_dict import get_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        target = self.folder / FOLDER / f"step-{step:06}"
        weights, moments = get_state_dict(model, optimizer)
        with add_path_to_errors(target):
            try:
                save({"model": weights, "optimizer": moments}, checkpoint_id=target)
            except CheckpointException as error:  # raised in every process, with the errors of all
                self.distributed.wait()
                if self.distributed.is_main:
                    shutil.rmtree(target, ignore_errors=True)
                raise next(iter(error.failures.values()))[0] from None
        self.distributed.wait()
        if self.distributed.is_main:
            with atomic_path(target / COMPLETE_MARKER) as temporary:  # written last
                torch.save(record, temporary)
            for older in self._list_folders():
                if older != target:
                    shutil.rmtree(older)

    def _resume_shards(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, not an Exception
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        from fledge.train.safe_checkpoint import SafePlanner, SafeReader

        self._reject_if_present(self.folder / FILE, "was written without fsdp")
        complete = [folder for folder in self._list_folders() if (folder / COMPLETE_MARKER).exists()]
        if not complete:
            return 0, {}
        path = complete[-1]
        try:
            record = torch.load(path / COMPLETE_MARKER, weights_only=True)
            self._check(path, record)
            weights, moments = get_state_dict(model, optimizer)
            parts = {"model": weights, "optimizer": moments}
            load(parts, storage_reader=SafeReader(path), planner=SafePlanner())
            with keep_settings(optimizer):
                set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            return int(record["step"]), record["meter"]
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:
            raise _damaged(path) from error

    def _list_folders(self) -> list[Path]:
        folders = (self.folder / FOLDER).glob("step-*")
        return sorted(folders, key=lambda folder: (len(folder.name), folder.name))  # by number

    def _reject_if_present(self, path: Path, reason: str) -> None:
        if path.exists():
            raise CheckpointError(
                f"{path} {reason}, but this run has the mode {self.distributed.mode}; use the same mode, or {ADVICE}"
            )

    def _check(self, path: Path, saved: Mapping[str, Any]) -> None:
        before = {RENAMED_SETTINGS.get(key, key): value for key, value in saved["identity"].items()}
        for key in sorted({*self.identity, *before}):
            if before.get(key) != self.identity.get(key):
                raise CheckpointError(
                    f"{path} belongs to another run: {key} was {before.get(key)!r} and is now "
                    f"{self.identity.get(key)!r}; choose another folder, or {ADVICE}"
                )


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged, so the run cannot continue from it; {ADVICE}")


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore the parameters of `trained`. Raises CheckpointError if names or shapes differ."""
    parameters = trained_parameters(model)
    if parameters.keys() != tensors.keys():
        other = sorted(parameters.keys() ^ tensors.keys())
        raise CheckpointError(f"the checkpoint has other trained parameters; only one side has {other[0]}")
    for name, tensor in tensors.items():
        parameter = parameters[name]
        if parameter.shape != tensor.shape:
            raise CheckpointError(f"{name} is {tuple(tensor.shape)} in the checkpoint, {tuple(parameter.shape)} here")
        parameter.copy_(tensor)


@contextmanager
def keep_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep the settings of this run while an optimizer loads its state, instead of those in the file."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, group_settings in zip(optimizer.param_groups, settings, strict=True):
        group.update(group_settings)
