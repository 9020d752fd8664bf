"""Text embeddings: a vector computed from the state after a text.

The state of a head is a decaying sum of outer products of keys and values. Summed over the keys, it is a decaying sum
of values: one vector per head. Each is normalized to length one, so that no head dominates. The layers are added, and
the result is normalized again. RWKV-4 has no heads: each layer counts as one head, with its weighted mean of values.
For a transformer the vector is the sum of all cached values.

No model here was trained for embeddings. `fledge bench embeddings` measures their quality.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from fledge.models.state import KvState, Rwkv4State, State, WkvState


def embed_state(state: State) -> Tensor:
    """(A,) float32 of length one for the first sequence. A is the width of all heads together (`dim_att`)."""
    layers = normalize(_summed_values(state), dim=-1).sum(dim=0)  # (H, V)
    return normalize(layers.flatten(), dim=0)


def _summed_values(state: State) -> Tensor:
    """(L, H, V) float32."""
    if isinstance(state, WkvState):
        return state.wkv[:, 0].float().sum(dim=-2)
    if isinstance(state, Rwkv4State):
        return state.mean[:, :1].float()
    assert isinstance(state, KvState)
    return state.values[:, 0, int(state.begin[0, 0]) : int(state.end[0, 0])].float().sum(dim=1)
