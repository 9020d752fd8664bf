"""Distributed training: the rows of each process, and the communication between processes.

    single   one process
    ddp      every process has the whole model, and the gradients are averaged (DistributedDataParallel)
    fsdp     every process has a shard of each parameter, its gradient and its optimizer state (FSDP2, by blocks)

`torchrun` starts the processes and connects them. Rows are distributed in turn, so n processes read in a step exactly
the rows that one process would read.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fledge.core.device import choose_device
from fledge.core.errors import ConfigError, TrainingError
from fledge.data.batches import Batch

MODES = ("ddp", "fsdp")
RELEASE_SECONDS = 0.2


@dataclass(frozen=True)
class Distributed:
    """The position of this process among all. The process with rank 0 writes files and prints."""

    rank: int = 0
    world: int = 1
    mode: str = "single"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints for all."""
        return self.rank == 0

    def shard(self, batch: Batch) -> Batch:
        """This process's rows of a batch."""
        if self.world > 1 and batch.idx.shape[0] % self.world:
            raise ConfigError(
                f"a batch has {batch.idx.shape[0]} rows, which {self.world} processes cannot share evenly; use a "
                f"multiple of {self.world}"
            )
        return batch.rows(slice(self.rank, None, self.world))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call instead of `model`. Its parameters stay whole (ddp) or are sharded (fsdp)."""
        if self.mode == "ddp":
            return DistributedDataParallel(model)
        if self.mode == "fsdp":
            _apply_fsdp(model)
        return model

    def no_sync(self, called: nn.Module, quiet: bool) -> AbstractContextManager[Any]:
        """Context of a forward and backward pass. quiet: gradients are not exchanged until a later pass."""
        if self.mode == "ddp" and quiet:
            assert isinstance(called, DistributedDataParallel)
            return called.no_sync()
        if self.mode == "fsdp":
            called.set_requires_gradient_sync(not quiet)  # type: ignore[operator]
        return nullcontext()

    def total(self, value: float) -> float:
        """The sum over all processes."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_exchange_device())
        dist.all_reduce(total)
        return float(total)

    def largest(self, value: int) -> int:
        """The largest value of all processes."""
        if self.world == 1:
            return value
        largest = torch.tensor(value, device=_exchange_device())
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def join(mode: str = "ddp", device: str | None = None) -> Iterator[Distributed]:
    """Join the processes that torchrun has started, or run alone. device: the device for training, None for the best.

    Raises TrainingError if the processes cannot connect.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if mode not in MODES:
        raise ConfigError(f"parallel is {mode!r}; choose from {', '.join(MODES)}")
    if world == 1 and mode == "ddp":
        yield Distributed()
        return
    if "RANK" not in os.environ:
        raise ConfigError(
            f"parallel = {mode!r} needs processes; start them with `torchrun --nproc-per-node N -m fledge`"
        )
    try:
        dist.init_process_group("nccl" if choose_device(device)[0].type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the processes that torchrun started cannot reach each other: {error}") from error
    try:
        with warnings.catch_warnings():
            # The view is the last token's input, a part of the state. States are never written to.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield Distributed(dist.get_rank(), world, mode)
    finally:
        # Threads of gloo may still reference tensors of the last exchange. Releasing them while Python exits aborts the
        # process, and gloo has no function to wait for them.
        time.sleep(RELEASE_SECONDS)
        dist.destroy_process_group()


def gather_full(tensor: Tensor) -> Tensor:
    """A tensor that fsdp has sharded, gathered; any other tensor unchanged."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def _exchange_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _apply_fsdp(model: Any) -> None:
    """Apply FSDP2 by blocks. The first block's ln0 is called separately, before the block, so it is its own unit."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:  # torch 2.5 has it in another module
        raise ConfigError(f"parallel = 'fsdp' needs a torch with FSDP2: {error}") from error
    mesh = dist.device_mesh.init_device_mesh(_exchange_device().type, (dist.get_world_size(),))
    for block in model.blocks:
        if hasattr(block, "ln0"):
            fully_shard(block.ln0, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
