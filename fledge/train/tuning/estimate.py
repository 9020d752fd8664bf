"""What a fine-tuning run will cost, before it begins: one micro-batch is tried, and nothing is changed by it.

Memory is counted, not measured, so that other uses of a device do not disturb it: weights, the optimizer's two moments,
and all tensors that exist at once in the worst moment of the largest micro-batch, gradients among them. That is what
torch's profiler sees. An allocator holds more than it hands out: on a CPU, glibc's took up to twice as much.
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

TRIED = 3
"""Micro-batches whose time is taken, after one that warms up."""


@dataclass(frozen=True)
class CostEstimate:
    """Bytes, and seconds of a whole run."""

    weights: int
    trained: int  # parameters
    optimizer: int  # its moments
    batch: int  # activations and gradients of the largest micro-batch
    seconds: float

    @property
    def memory(self) -> int:
        """All bytes together."""
        return self.weights + self.optimizer + self.batch


def estimate(model: BaseModel, batches: ExampleBatches, settings: TrainSettings) -> CostEstimate:
    """Try a few micro-batches of the first epoch, the largest among them."""
    sizes = batches.sizes
    largest = batches[max(range(len(sizes)), key=sizes.__getitem__)]
    batch = _peak_bytes(model, largest)
    speed = _tokens_per_second(model, [batches[number] for number in range(min(TRIED, len(sizes)))])
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


def _peak_bytes(model: BaseModel, batch: Batch) -> int:
    """Bytes of all tensors that a forward and a backward pass have at once, beside the parameters."""
    counter = _LiveTensors()
    with counter:
        _loss(model, batch).backward()
    model.zero_grad(set_to_none=True)
    return counter.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._known | given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(id(storage))
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, id(storage), storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _tokens_per_second(model: BaseModel, batches: list[Batch]) -> float:
    """Of forward and backward passes; padding counts as tokens."""
    _loss(model, batches[0]).backward()
    began = time.perf_counter()
    for batch in batches:
        _loss(model, batch).backward()
    elapsed = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return sum(batch.idx[:, 1:].numel() for batch in batches) / elapsed
