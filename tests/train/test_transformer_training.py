"""The transformer is trained with what trains the others: loss, optimiser groups, bfloat16 products."""

from __future__ import annotations

import pytest
import torch

from fledge.models import ModelConfig, build, init_weights
from fledge.models.layers import Linear
from fledge.train.loss import next_token_loss
from fledge.train.optim import AdamSettings, build_optimizer, parameter_groups, set_learning_rate

CONFIG = ModelConfig.transformer(2, 32, vocab_size=40, head_size=8)


def test_matrices_decay_and_norms_do_not() -> None:
    model = build(CONFIG)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1)}
    norms = {f"blocks.{layer}.ln{norm}.weight" for layer in range(2) for norm in (1, 2)} | {"ln_out.weight"}
    assert groups == {"fast": set(), "rest": norms, "matrices": set(names.values()) - norms}
    assert "blocks.1.ffn.gate.weight" in groups["matrices"] and "emb.weight" in groups["matrices"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_loss_falls(dtype: torch.dtype | None) -> None:
    model = build(CONFIG)
    init_weights(model, 0)
    for module in model.modules():
        if isinstance(module, Linear):
            module.compute_dtype = dtype
    optimizer = build_optimizer(model, AdamSettings(eps=1e-8))
    set_learning_rate(optimizer, 1e-2)
    text = torch.arange(1, 38).repeat(4)
    losses = []
    for number in range(20):
        batch = torch.stack([text[start : start + 33] for start in range(number, number + 6)])
        loss = next_token_loss(model(batch[:, :-1])[0], batch[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 3.4 < losses[0] < 4.0 and losses[-1] < 0.3 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
