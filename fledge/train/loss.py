"""Cross-entropy in float32, with L2Wrap: a weak pull of the largest logit of each position towards zero.

L2Wrap changes only the gradient (for a mean over N targets, by the logit times 1e-4 / N); the reported loss is the
cross-entropy. Source: the official training code.

`summed_loss` takes logits and is the specification. `head_loss` takes the head and its input, and computes the logits
of a few tokens at a time: with a vocabulary of 65,536, the logits of a batch need more memory than the rest of a small
model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fledge.data.batches import Batch
from fledge.kernels.fused import cross_entropy_
from fledge.models import State
from fledge.models.layers import Linear

PULL = 1e-4
CHUNK_LOGITS = 1 << 22  # 16 MB, which fits in a large cache
MIN_CHUNK_TOKENS = 256  # smaller chunks would read the weight of a large vocabulary too often


class _L2Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, loss_mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, loss_mask)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        logits, loss_mask = ctx.saved_tensors
        largest, where = logits.max(-1, keepdim=True)
        if loss_mask is not None:
            largest = largest * loss_mask[..., None]
        pull = torch.zeros_like(logits).scatter_(-1, where, largest * (PULL * gradients[0]))
        return gradients[0], pull, None


def summed_loss(logits: Tensor, targets: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """The sum of the cross-entropies in nats. logits: (B, T, vocab) float32; targets: (B, T) int64, the id after each
    token; loss_mask: (B, T) bool, the targets that count, None for all.

    It is a sum, because the mean of a step is over all its rows, windows and processes; the caller divides by the
    number of targets. The pull scales with the incoming gradient, so it is divided as well.
    """
    if loss_mask is not None:
        targets = targets.masked_fill(~loss_mask, -100)  # torch ignores this target
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    wrapped: Tensor = _L2Wrap.apply(loss, logits, loss_mask)
    return wrapped


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all targets: `summed_loss` for one batch that is a whole step."""
    return summed_loss(logits, targets) / targets.numel()


def head_loss(head: Linear, x: Tensor, *, targets: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """`summed_loss(head(x), targets, loss_mask)` without the logits of all tokens; x: (B, T, C) float32.

    It computes the gradients together with the loss, in one pass over chunks of the tokens.
    """
    if loss_mask is not None:
        x, targets = x[loss_mask], targets[loss_mask]
    dtype = head.compute_dtype or head.weight.dtype
    loss: Tensor = _HeadLoss.apply(x.flatten(0, -2), head.weight, targets.flatten(), dtype)
    return loss


def batch_loss(model: nn.Module, batch: Batch, state: State | None = None) -> tuple[Tensor, State]:
    """The summed loss of a batch that follows `state`, on the model's device, and the state after the batch."""
    device = next(model.parameters()).device
    idx = batch.idx.to(device)
    loss_mask, document_start = (
        None if mask is None else mask.to(device) for mask in (batch.loss_mask, batch.document_start)
    )
    readout = partial(head_loss, targets=idx[:, 1:], loss_mask=loss_mask)
    loss, after = model(idx[:, :-1], state, document_start=document_start, readout=readout)
    return loss, after


class _HeadLoss(torch.autograd.Function):
    """x (M, C), weight (vocab, C), targets (M,), dtype of the products -> the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.weight_dtype = weight.dtype
        low = weight.to(dtype)
        dx = torch.empty_like(x) if needs_x else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = x.new_zeros(())
        size = max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, x.shape[0], size):
            chunk = x[start : start + size].to(dtype)
            logits = chunk @ low.t()  # (size, vocab)
            total += cross_entropy_(logits, targets[start : start + size], PULL).sum()
            if dx is not None:
                dx[start : start + size] = logits @ low  # the logits are now their gradient
            if dweight is not None:
                dweight += logits.t() @ chunk
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dx, dweight = ctx.saved_tensors
        dx = None if dx is None else dx * gradients[0]
        dweight = None if dweight is None else (dweight * gradients[0]).to(ctx.weight_dtype)
        return dx, dweight, None, None
