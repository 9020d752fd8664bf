"""One call of the model for sequences of any lengths: those that read a prompt and those that write a token.

On the native library the states are read where they lie and every sequence gets the bits it would get alone. Other
models take the written tokens as one batch and the prompts one by one, so that nothing is padded; their sums depend on
the size of a batch, so there a token may differ from the one drawn alone where two are equally probable up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fledge.engine.generation import get_device
from fledge.models.native_model import NativeModel
from fledge.models.state_slice import StateSlice, gather_states


def run_model(
    model: nn.Module, pieces: Sequence[Sequence[int]], rows: Sequence[StateSlice]
) -> tuple[Tensor, list[StateSlice]]:
    """Read each piece (at least one id) after its row: the scores then (B, V), float32 on the CPU, and the rows."""
    if isinstance(model, NativeModel):
        logits, state = model.read(pieces, rows)
        return logits, [StateSlice(state, place) for place in range(len(rows))]
    single = [place for place, piece in enumerate(pieces) if len(piece) == 1]
    groups = [single] if single else []
    groups += [[place] for place, piece in enumerate(pieces) if len(piece) > 1]
    found: dict[int, tuple[Tensor, StateSlice]] = {}
    for group in groups:
        idx = torch.tensor([list(pieces[place]) for place in group], dtype=torch.long, device=get_device(model))
        with torch.no_grad():
            scores, state = model(idx, gather_states([rows[place] for place in group]), last=True)
        found |= {place: (scores[at, -1], StateSlice(state, at)) for at, place in enumerate(group)}
    ordered = [found[place] for place in range(len(rows))]
    return torch.stack([scores for scores, _ in ordered]).float().cpu(), [row for _, row in ordered]
