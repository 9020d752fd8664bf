"""Checkpoints of a training run: what is trained, optimiser and step in one file that is replaced whole, never edited.

Parameters that require no gradient are the same before and after, so they are not saved: a LoRA's run stays small.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fledge.core.errors import CheckpointError
from fledge.core.files import atomic_path


def save_run(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write everything a run needs to go on after `step` steps."""
    with atomic_path(path) as temporary:
        torch.save({"model": _trained(model), "optimizer": optimizer.state_dict(), "step": step}, temporary)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def resume_run(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load what `save_run` wrote into model and optimiser; returns the steps done, 0 without a file."""
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if saved["model"].keys() != _trained(model).keys():
            raise ValueError("it holds other parameters than this run trains")
        model.load_state_dict(saved["model"], strict=False)
        asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved["optimizer"])
        for group, settings in zip(optimizer.param_groups, asked, strict=True):
            group.update(settings)  # what this run asks for, not what the file was written with
        return int(saved["step"])
    except Exception as error:
        raise CheckpointError(f"{path}: cannot resume from it ({error}); move it away to start anew") from error
