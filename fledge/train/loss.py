"""Cross-entropy in float32, with L2Wrap: a gentle pull of each position's largest logit towards zero.

L2Wrap acts on the gradient only (for a mean over N targets, the logit itself times 1e-4 / N); the reported loss is the
cross-entropy. Source: the official training code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PULL = 1e-4


class _L2Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, counted: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, counted)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        logits, counted = ctx.saved_tensors
        largest, where = logits.max(-1, keepdim=True)
        if counted is not None:
            largest = largest * counted[..., None]
        pull = torch.zeros_like(logits).scatter_(-1, where, largest * (PULL * gradients[0]))
        return gradients[0], pull, None


def summed_loss(logits: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """The sum of the cross-entropies in nats. logits: (B, T, vocab) float32; targets: (B, T) int64, the id that follows
    each token; counted: (B, T) bool, which of them count, None for all.

    A sum, because a step's mean is over all its rows, windows and processes: who knows the number of targets divides.
    The pull scales with the incoming gradient, so that it is divided as well.
    """
    if counted is not None:
        targets = targets.masked_fill(~counted, -100)  # the number that torch leaves out
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    wrapped: Tensor = _L2Wrap.apply(loss, logits, counted)
    return wrapped


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all targets: `summed_loss` for one batch that is a whole step."""
    return summed_loss(logits, targets) / targets.numel()
