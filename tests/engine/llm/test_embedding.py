"""Text embeddings."""

from __future__ import annotations

import pytest
import torch
from random_checkpoints import VERSIONS, random_checkpoint

from fledge.checkpoint import assemble, detect
from fledge.engine.generation import advance_state, make_initial_state
from fledge.engine.llm.embedding import embed_state
from fledge.models import ModelConfig, WkvState, build, init_weights


def test_embedding_matches_hand_computed_values() -> None:
    wkv = torch.zeros(2, 1, 2, 2, 2)  # (L, B, H, K, V)
    wkv[0, 0, 0] = torch.tensor([[1.0, 0.0], [2.0, 4.0]])  # sums to (3, 4): (0.6, 0.8)
    wkv[0, 0, 1] = torch.tensor([[0.0, 5.0], [0.0, -3.0]])  # (0, 2): (0, 1)
    wkv[1, 0, 0] = torch.tensor([[2.0, 0.0], [0.0, 0.0]])  # (1, 0); the other head is empty
    state = WkvState(torch.zeros(2, 1, 4), wkv, torch.zeros(2, 1, 4))
    expected = torch.tensor([1.6, 0.8, 0.0, 1.0])
    assert torch.allclose(embed_state(state), expected / expected.norm())


def model_of(version: str) -> torch.nn.Module:
    if version == "llama":
        config = ModelConfig("llama", 77, n_layer=3, n_embd=32, dim_att=40, dim_ffn=56, n_head=5)
        model = build(config)
        init_weights(model, seed=3)
        return model.eval().requires_grad_(False)
    tensors = random_checkpoint(version, n_layer=3, n_embd=40, head_size=8, vocab_size=77, seed=3)
    return assemble(detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors)


@pytest.mark.parametrize("version", [*VERSIONS, "llama"])
def test_embedding_of_every_model_family(version: str) -> None:
    model = model_of(version)
    one, same, other = (
        embed_state(advance_state(model, ids, make_initial_state(model)))
        for ids in ([5, 6, 7], [5, 6, 7], [70, 3, 9, 11])
    )
    assert one.dtype == torch.float32 and one.shape == (40,)
    assert torch.equal(one, same) and float(one.norm()) == pytest.approx(1, abs=1e-5)
    assert float(one @ other) < 0.99
