"""How well a model predicts text it has never seen: bits per byte, comparable across vocabularies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fledge.models import Trunk


@torch.inference_mode()
def document_nats(model: Trunk, ids: Sequence[int], *, start: int = 0, window: int = 512) -> float:
    """The sum of -ln p over a document's tokens, read from a fresh state after the end-of-text id `start`.

    The state is carried from window to window, so a document of any length is scored in constant memory.
    """
    total, state = 0.0, None
    device = model.emb.weight.device
    row = torch.tensor([[start, *ids]], dtype=torch.long, device=device)
    for begin in range(0, len(ids), window):
        inputs = row[:, begin : begin + window]
        targets: Tensor = row[:, begin + 1 : begin + window + 1]
        inputs = inputs[:, : targets.shape[1]]
        logits, state = model(inputs, state)
        total += float(torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum"))
    return total


def bits_per_byte(nats: float, size: float) -> float:
    """Nats over a text of `size` bytes -> bits per byte."""
    return nats / math.log(2) / size
