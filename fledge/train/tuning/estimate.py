"""An estimate of the memory and time of a fine-tuning run, from a few micro-batches. It changes nothing.

Memory is counted, not measured, so other programs on the device do not disturb it. It contains the weights, the two
moments of the optimizer, and the peak of all other tensors, gradients included, during the largest micro-batch. An
allocator needs more than this: on a CPU, that of glibc needed up to twice as much.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fledge.data.batches import Batch
from fledge.data.examples import ExampleBatches
from fledge.models import BaseModel
from fledge.train.loop import TrainSettings
from fledge.train.loss import batch_loss

TIMED_BATCHES = 3
"""Micro-batches that are timed, after one for warm-up."""


@dataclass(frozen=True)
class CostEstimate:
    """The memory in bytes and the time in seconds of a whole run."""

    weights: int
    trained: int  # number of trained parameters
    optimizer: int  # the moments
    batch: int  # activations and gradients of the largest micro-batch
    seconds: float

    @property
    def memory(self) -> int:
        """The total in bytes."""
        return self.weights + self.optimizer + self.batch


def estimate(model: BaseModel, batches: ExampleBatches, settings: TrainSettings) -> CostEstimate:
    """Run a few micro-batches of the first epoch, including the largest one."""
    sizes = batches.sizes
    largest = batches[max(range(len(sizes)), key=sizes.__getitem__)]
    batch = _measure_peak_bytes(model, largest)
    speed = _measure_tokens_per_second(model, [batches[number] for number in range(min(TIMED_BATCHES, len(sizes)))])
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    per_step = settings.accumulate * sum(sizes) / len(sizes)
    return CostEstimate(
        weights=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        trained=trained,
        optimizer=2 * 4 * trained,
        batch=batch,
        seconds=settings.schedule.steps * per_step / speed,
    )


def _loss(model: BaseModel, batch: Batch) -> Tensor:
    return batch_loss(model, batch)[0] / max(1, batch.targets)


def _measure_peak_bytes(model: BaseModel, batch: Batch) -> int:
    """The peak of the bytes of all tensors in a forward and a backward pass, without the parameters."""
    counter = _LiveTensors()
    with counter:
        _loss(model, batch).backward()
    model.zero_grad(set_to_none=True)
    return counter.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate and that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._current = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._counted | inputs:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._counted.add(id(storage))
        self._current += storage.nbytes()
        self.peak = max(self.peak, self._current)
        weakref.finalize(storage, self._remove, id(storage), storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self._current -= size


def _measure_tokens_per_second(model: BaseModel, batches: list[Batch]) -> float:
    """The speed of forward and backward passes together. Padding counts as tokens."""
    _loss(model, batches[0]).backward()
    start = time.perf_counter()
    for batch in batches:
        _loss(model, batch).backward()
    elapsed = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return sum(batch.idx[:, 1:].numel() for batch in batches) / elapsed
