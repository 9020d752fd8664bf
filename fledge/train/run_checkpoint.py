"""Checkpoints of a training run: weights, optimizer, step and the metrics of the next line.

    last.pt            one process, or ddp: one file that is replaced atomically
    last/step-000120   fsdp: a folder of torch.distributed.checkpoint with a part from every process; the older folder
    is
                       deleted when the newer one is complete

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
from fledge.train.distributed import Distributed, own_part

FILE, FOLDER, WHOLE = "last.pt", "last", "whole"
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

    def __init__(self, folder: Path, team: Distributed, identity: Mapping[str, Any]) -> None:
        self.folder, self.team, self.identity = folder, team, dict(identity)
        self.written = 0
        if team.is_main:
            for leftover in folder.glob(f".{FILE}.*.part"):  # of a process that was killed while it wrote
                leftover.unlink()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, meter: dict[str, Any]) -> None:
        """Save the run after `step` steps, unless it is saved already. All processes must call this.

        Raises SaveError if the weights are not finite or cannot be written; the previous checkpoint is then unchanged.
        """
        if step == self.written:
            return
        if not self._finite(model):
            then = (
                f"continue from step {self.written}, the last good one: give" if self.written else "begin again: give"
            )
            raise SaveError(
                f"after step {step} the weights are not finite, so they are not saved; {then} the same command with a "
                "lower learning rate, or see the published remedies for loss spikes (docs/guides/training.md)"
            )
        facts = {"step": step, "identity": self.identity, "meter": meter}
        trouble: OSError | None = None
        try:
            if self.team.mode == "fsdp":
                self._save_parts(model, optimizer, step, facts)
            elif self.team.is_main:
                with atomic_path(self.folder / FILE) as temporary:
                    torch.save({**facts, "model": trained(model), "optimizer": optimizer.state_dict()}, temporary)
        except OSError as error:
            trouble = error
        if self.team.largest(int(trouble is not None)):  # otherwise the others would wait for a failed process
            raise self._unwritten(trouble)
        self.written = step

    def _unwritten(self, trouble: OSError | None) -> SaveError:
        kept = f"the run continues from the checkpoint before, of step {self.written}" if self.written else ""
        why = "see the other processes" if trouble is None else describe_disk_error(trouble, self.folder, kept)
        return SaveError(f"the checkpoint in {self.folder} cannot be written: {why}")

    def _finite(self, model: nn.Module) -> bool:
        """Whether all trained parameters are finite, in all processes."""
        sound = [own_part(tensor).isfinite().all() for tensor in trained(model).values()]
        return not self.team.largest(int(not torch.stack(sound).all()))

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        """Load the checkpoint. Returns the number of completed steps (0 without a checkpoint) and the pending metrics.

        Raises CheckpointError for a damaged checkpoint and for one of another run.
        """
        step, meter = (self._resume_parts if self.team.mode == "fsdp" else self._resume_file)(model, optimizer)
        if step and not self._finite(model):
            raise CheckpointError(f"the checkpoint in {self.folder} holds weights that are not finite; {ADVICE}")
        self.written = step
        return step, meter

    def _resume_file(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        path = self.folder / FILE
        if not path.exists():
            self._refuse(self.folder / FOLDER, "was written by processes with fsdp")
            return 0, {}
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            self._check(path, saved)
            restore(model, saved["model"])
            with kept_settings(optimizer):
                optimizer.load_state_dict(saved["optimizer"])
            return int(saved["step"]), saved["meter"]
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file can cause any error in torch
            raise _damaged(path) from error

    def _save_parts(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, facts: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, not an Exception
        from torch.distributed.checkpoint.state_dict import get_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        target = self.folder / FOLDER / f"step-{step:06}"
        weights, moments = get_state_dict(model, optimizer)
        with add_path_to_errors(target):
            try:
                save({"model": weights, "optimizer": moments}, checkpoint_id=target)
            except CheckpointException as error:  # raised in every process, with the errors of all
                self.team.wait()
                if self.team.is_main:
                    shutil.rmtree(target, ignore_errors=True)
                raise next(iter(error.failures.values()))[0] from None
        self.team.wait()
        if self.team.is_main:
            with atomic_path(target / WHOLE) as temporary:  # written last: it marks the folder as complete
                torch.save(facts, temporary)
            for older in self._folders():
                if older != target:
                    shutil.rmtree(older)

    def _resume_parts(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, not an Exception
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        from fledge.train.safe_checkpoint import PartsPlanner, PartsReader

        self._refuse(self.folder / FILE, "was written without fsdp")
        found = [folder for folder in self._folders() if (folder / WHOLE).exists()]
        if not found:
            return 0, {}
        path = found[-1]
        try:
            facts = torch.load(path / WHOLE, weights_only=True)
            self._check(path, facts)
            weights, moments = get_state_dict(model, optimizer)
            parts = {"model": weights, "optimizer": moments}
            load(parts, storage_reader=PartsReader(path), planner=PartsPlanner())
            with kept_settings(optimizer):
                set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            return int(facts["step"]), facts["meter"]
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:
            raise _damaged(path) from error

    def _folders(self) -> list[Path]:
        found = (self.folder / FOLDER).glob("step-*")
        return sorted(found, key=lambda folder: (len(folder.name), folder.name))  # by number

    def _refuse(self, path: Path, why: str) -> None:
        if path.exists():
            raise CheckpointError(
                f"{path} {why}, and this run is of mode {self.team.mode}; continue as it was, or {ADVICE}"
            )

    def _check(self, path: Path, saved: Mapping[str, Any]) -> None:
        before = {RENAMED_SETTINGS.get(key, key): value for key, value in saved["identity"].items()}
        for key in sorted({*self.identity, *before}):
            if before.get(key) != self.identity.get(key):
                raise CheckpointError(
                    f"{path} is of another run: {key} was {before.get(key)!r} and is {self.identity.get(key)!r} now; "
                    f"take another folder, or {ADVICE}"
                )


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged, so the run cannot continue from it; {ADVICE}")


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore the parameters of `trained`. Raises CheckpointError if names or shapes differ."""
    mine = trained(model)
    if mine.keys() != tensors.keys():
        other = sorted(mine.keys() ^ tensors.keys())
        raise CheckpointError(f"the checkpoint trains other parameters; {other[0]} is in one of them only")
    for name, tensor in tensors.items():
        if mine[name].shape != tensor.shape:
            raise CheckpointError(f"{name} is {tuple(tensor.shape)} in the checkpoint, {tuple(mine[name].shape)} here")
        mine[name].copy_(tensor)


@contextmanager
def kept_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep the settings of this run while an optimizer loads its state, instead of those in the file."""
    asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, asked, strict=True):
        group.update(settings)
