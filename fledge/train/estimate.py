"""What a fine-tuning run will cost, before it begins: one micro-batch is tried, and nothing is changed by it.

Memory is counted, not measured, so it means the same on every device: weights, gradients, the optimiser's two moments,
what the forward pass of the largest micro-batch keeps for the backward pass, and the logits with their gradient.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.data.batches import Batch
from fledge.data.examples import ExampleBatches
from fledge.models import Trunk
from fledge.train.loop import TrainSettings
from fledge.train.loss import summed_loss

TRIED = 3
"""Micro-batches whose time is taken, after one that warms up."""


@dataclass(frozen=True)
class Estimate:
    """Bytes, and seconds of a whole run."""

    weights: int
    trained: int  # parameters
    optimiser: int  # gradients and moments
    activations: int  # of the largest micro-batch
    seconds: float

    @property
    def memory(self) -> int:
        """All bytes together."""
        return self.weights + self.optimiser + self.activations


def estimate(model: Trunk, batches: ExampleBatches, settings: TrainSettings) -> Estimate:
    """Try a few micro-batches of the first epoch, the largest among them."""
    sizes = [batches[number].idx.numel() for number in range(batches.per_epoch)]
    largest = batches[max(range(len(sizes)), key=sizes.__getitem__)]
    activations = _kept_bytes(model, largest)
    speed = _tokens_per_second(model, [batches[number] for number in range(min(TRIED, len(sizes)))])
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    per_step = settings.accumulate * sum(sizes) / len(sizes)
    return Estimate(
        weights=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        trained=trained,
        optimiser=3 * 4 * trained,
        activations=activations,
        seconds=settings.schedule.steps * per_step / speed,
    )


def _loss(model: Trunk, batch: Batch) -> Tensor:
    device = model.emb.weight.device
    idx = batch.idx.to(device)
    counted = None if batch.counted is None else batch.counted.to(device)
    return summed_loss(model(idx[:, :-1])[0], idx[:, 1:], counted) / max(1, batch.targets)


def _kept_bytes(model: Trunk, batch: Batch) -> int:
    """Bytes that autograd keeps from forward to backward, beside the parameters, and one gradient of the logits."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(model, batch)
    logits = batch.idx[:, 1:].numel() * model.config.vocab_size * 4
    return sum(kept.values()) + logits


def _tokens_per_second(model: Trunk, batches: list[Batch]) -> float:
    """Of forward and backward passes; padding counts as tokens."""
    _loss(model, batches[0]).backward()
    began = time.perf_counter()
    for batch in batches:
        _loss(model, batch).backward()
    elapsed = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return sum(batch.idx[:, 1:].numel() for batch in batches) / elapsed
