"""The random checkpoints are suitable for comparing logits: each of their tensors has a visible effect on the
logits."""

from __future__ import annotations

import pytest
import torch
from random_checkpoints import VERSIONS, random_checkpoint
from torch import Tensor

from fledge.models import ModelConfig, build


def logits(config: ModelConfig, tensors: dict[str, Tensor]) -> Tensor:
    """(T, vocab) of a fixed text."""
    model = build(config, "meta")
    model.load_state_dict(tensors, strict=True, assign=True)
    with torch.no_grad():
        return model(torch.arange(11)[None] % config.vocab_size)[0][0]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensor_matters(version: str) -> None:
    tuned, bonus = version != "4", "time_first" if version == "5.0" else "time_faaaa"
    tensors = random_checkpoint(version, n_layer=2, n_embd=48, dim_ffn=71, bonus=bonus, tuned_state=tuned)
    config = ModelConfig(
        version,
        37,
        n_layer=2,
        n_embd=48,
        dim_att=48,
        dim_ffn=71,
        n_head=6,
        mix_rank=8,
        decay_rank=12,
        bonus=bonus,
        tuned_state=tuned,
    )
    plain = logits(config, tensors)
    assert 0.5 < plain.std() < 2
    # Noise, not another scale: a norm cancels the scale of its inputs.
    effects = {
        name: float((logits(config, tensors | {name: tensor + 0.1 * torch.randn_like(tensor)}) - plain).abs().max())
        for name, tensor in tensors.items()
    }
    assert {name: effect for name, effect in effects.items() if effect < 1e-3} == {}
