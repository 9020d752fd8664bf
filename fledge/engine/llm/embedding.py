"""A text as a vector: what it leaves in the heads.

A head's state is a sum of what it read, value by key, old text faded. Summed over the keys it is that fading sum of
values, one vector a head. Each is brought to length one, so that no head speaks louder than the others; the layers are
added up, and the whole again has length one. RWKV-4 has no heads: a layer counts as one, with its weighted mean of
values. Of a transformer it is the sum of the values it has seen.

No model here was trained for this. How well it does is measured: `fledge bench embeddings`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from fledge.models.state import KvState, Rwkv4State, State, WkvState


def embedding(state: State) -> Tensor:
    """(A,) float32 of length one, A being the width of the heads together (`dim_att`), of the first sequence."""
    summed = normalize(_values(state), dim=-1).sum(dim=0)  # (H, V)
    return normalize(summed.flatten(), dim=0)


def _values(state: State) -> Tensor:
    """(L, H, V) float32."""
    if isinstance(state, WkvState):
        return state.wkv[:, 0].float().sum(dim=-2)
    if isinstance(state, Rwkv4State):
        return state.mean[:, :1].float()
    assert isinstance(state, KvState)
    return state.values[:, 0, int(state.begin[0, 0]) : int(state.end[0, 0])].float().sum(dim=1)
