"""Model calls for sequences of any lengths: prompts that are prefilled and tokens that are decoded, in one batch.

The native library reads the states in place, and every sequence gets the bits that it would get alone. Other models
decode all sequences as one batch and prefill prompts one by one, so nothing is padded. Their sums depend on the batch
size, so a token may differ from the one sampled alone if two tokens are equally probable up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fledge.engine.generation import get_device
from fledge.models.native_model import NativeModel
from fledge.models.state_slice import StateSlice, gather_states


def run_model(
    model: nn.Module, ids: Sequence[Sequence[int]], states: Sequence[StateSlice]
) -> tuple[Tensor, list[StateSlice]]:
    """Read the ids of each sequence (at least one) after its state.

    Returns the logits (B, V) after the last id of each, float32 on the CPU, and the states after them.
    """
    if isinstance(model, NativeModel):
        logits, state = model.read(ids, states)
        return logits, [StateSlice(state, index) for index in range(len(states))]
    decoding = [index for index, each in enumerate(ids) if len(each) == 1]
    groups = [decoding] if decoding else []
    groups += [[index] for index, each in enumerate(ids) if len(each) > 1]
    results: dict[int, tuple[Tensor, StateSlice]] = {}
    for group in groups:
        idx = torch.tensor([list(ids[index]) for index in group], dtype=torch.long, device=get_device(model))
        with torch.no_grad():
            scores, state = model(idx, gather_states([states[index] for index in group]), last=True)
        results |= {index: (scores[row, -1], StateSlice(state, row)) for row, index in enumerate(group)}
    ordered = [results[index] for index in range(len(states))]
    return torch.stack([scores for scores, _ in ordered]).float().cpu(), [after for _, after in ordered]


def run_with_all_logits(model: nn.Module, ids: Sequence[int], state: StateSlice) -> tuple[Tensor, StateSlice]:
    """Read `ids` of one sequence: the logits (T, V) after each id, on the model's device, and the state after them."""
    idx = torch.tensor([list(ids)], dtype=torch.long, device=get_device(model))  # (1, T)
    with torch.no_grad():
        logits, after = model(idx, state.extract())
    return logits[0], StateSlice(after)
