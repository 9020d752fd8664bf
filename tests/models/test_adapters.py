"""LoRA around a model: the same as merged weights, on the same tensors, and a tuned state the right way round."""

from __future__ import annotations

import pytest
import torch
from closeness import MODEL_TOLERANCE, UNIT_ROUNDOFF, assert_close_relative
from random_checkpoints import VERSIONS, random_checkpoint
from torch import Tensor

from fledge.checkpoint import assemble, detect
from fledge.core.errors import UsageError
from fledge.models import BaseModel
from fledge.models.adapters import (
    TARGETS,
    LoraFactors,
    LoraLinear,
    add_lora,
    build_adapted_model,
    build_tuned_state,
    combine_factors,
    copy_sharing_weights,
    init_factors,
    merge_weight,
    select_targets,
)
from fledge.models.layers import pack_linears

VOCAB = 23
IDX = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
every_version = pytest.mark.parametrize("version", VERSIONS)


def model_of(version: str = "6.0", **sizes: object) -> BaseModel:
    tensors = random_checkpoint(version, n_layer=2, n_embd=24, dim_ffn=40, vocab_size=VOCAB, **sizes)  # type: ignore[arg-type]
    model = assemble(detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors)
    assert isinstance(model, BaseModel)
    return model.requires_grad_(False)


def names_of(model: BaseModel) -> list[str]:
    return select_targets([name for name, _ in model.named_parameters()])


def random_factors(model: BaseModel, rank: int = 3, seed: int = 0) -> dict[str, LoraFactors]:
    """Factors whose product is visible in the logits."""
    fresh = init_factors(model, names_of(model), rank, 2.0 * rank, seed)
    draw = torch.Generator().manual_seed(seed + 50)
    return {
        name: LoraFactors(one.down, 0.3 * torch.randn(one.up.shape, generator=draw), one.scale)
        for name, one in fresh.items()
    }


@every_version
def test_factors_do_what_merged_weights_do(version: str) -> None:
    model = model_of(version)
    factors = random_factors(model)
    assert len(factors) == 2 * (8 if version not in ("4", "5.0") else 7)
    merged = model_of(version)
    for name, one in factors.items():
        weight = merged.get_parameter(f"{name}.weight")
        weight.copy_(merge_weight(weight, one))
    before, unmerged = model(IDX)[0], build_adapted_model(model, factors)(IDX)[0]
    assert (unmerged - before).abs().max() > 0.3
    assert_close_relative(unmerged, merged(IDX)[0], MODEL_TOLERANCE)
    assert torch.equal(model(IDX)[0], before)


def test_untrained_factors_change_nothing() -> None:
    model = model_of()
    factors = init_factors(model, names_of(model), 5, 10.0, 0)
    assert torch.equal(build_adapted_model(model, factors)(IDX)[0], model(IDX)[0])
    down = factors["blocks.1.ffn.value"].down
    assert down.shape == (5, 40) and 0.9 * 40**-0.5 < down.abs().max() <= 40**-0.5
    assert torch.equal(down, init_factors(model, names_of(model), 5, 10.0, 0)["blocks.1.ffn.value"].down)
    assert not torch.equal(down, init_factors(model, names_of(model), 5, 10.0, 1)["blocks.1.ffn.value"].down)


def test_many_adapted_models_are_one_in_memory() -> None:
    model = model_of()
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    one, other = (
        build_adapted_model(model, random_factors(model)),
        build_adapted_model(model, random_factors(model, seed=1)),
    )
    for twin in (one, other):
        found = {name: weight.data_ptr() for name, weight in twin.named_parameters() if ".lora_" not in name}
        assert found == places
    assert not torch.equal(one(IDX)[0], other(IDX)[0])
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert "blocks.1.att.gate.lora_A" in one.state_dict() and one.config == model.config


def test_adapters_add_up() -> None:
    model = model_of()
    first = random_factors(model, rank=2)
    second = {name: one for name, one in random_factors(model, rank=3, seed=1).items() if ".ffn." in name}
    together = build_adapted_model(model, combine_factors([first, second]))
    assert_close_relative(
        build_adapted_model(build_adapted_model(model, first), second)(IDX)[0], together(IDX)[0], MODEL_TOLERANCE
    )
    assert together.get_parameter("blocks.0.ffn.key.lora_A").shape == (5, 24)
    assert together.get_parameter("blocks.0.att.key.lora_A").shape == (2, 24)
    merged = model_of()
    for factors in (first, second):
        for name, one in factors.items():
            weight = merged.get_parameter(f"{name}.weight")
            weight.copy_(merge_weight(weight, one))
    assert_close_relative(together(IDX)[0], merged(IDX)[0], MODEL_TOLERANCE)


def test_parts_take_the_place_of_parameters() -> None:
    model = model_of()
    new = model.blocks[0].att.time_maa_x + 0.5  # type: ignore[union-attr,operator]
    twin = build_adapted_model(model, {}, {"blocks.0.att.time_maa_x": new})
    changed = model_of()
    changed.get_parameter("blocks.0.att.time_maa_x").add_(0.5)
    assert torch.equal(twin(IDX)[0], changed(IDX)[0]) and not torch.equal(twin(IDX)[0], model(IDX)[0])


def test_factors_on_packed_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.models.layers.WORTH_PACKING", 0)
    plain, packed = model_of(), model_of()
    if reason := pack_linears(packed):
        pytest.skip(reason)
    factors = random_factors(plain)
    twin = build_adapted_model(packed, factors)
    assert_close_relative(twin(IDX)[0], build_adapted_model(plain, factors)(IDX)[0], MODEL_TOLERANCE)
    assert twin.head.packed is packed.head.packed
    parts = {"blocks.0.att.value.weight": torch.randn_like(plain.blocks[0].att.value.weight)}
    found, expected = (
        build_adapted_model(packed, factors, parts)(IDX)[0],
        build_adapted_model(plain, factors, parts)(IDX)[0],
    )
    assert_close_relative(found, expected, MODEL_TOLERANCE)
    assert_close_relative(packed(IDX)[0], plain(IDX)[0], MODEL_TOLERANCE)  # stays as it was


def test_only_the_factors_learn() -> None:
    model = copy_sharing_weights(model_of())
    add_lora(model, random_factors(model))
    model(IDX)[0].sum().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.abs().max() > 0)) == (".lora_" in name), name


def test_merging_rounds_once() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=draw)
    factors = LoraFactors(torch.randn(2, 7, generator=draw), torch.randn(5, 2, generator=draw), 0.5)
    exact = weight.bfloat16().double() + 0.5 * factors.up.double() @ factors.down.double()
    merged = merge_weight(weight.bfloat16(), factors)
    assert merged.dtype == torch.bfloat16
    # One rounding of each number to bfloat16, after float32 sums of numbers below 8.
    torch.testing.assert_close(
        merged.double(), exact, rtol=UNIT_ROUNDOFF[torch.bfloat16], atol=8 * UNIT_ROUNDOFF[torch.float32]
    )


def test_targets_have_short_names() -> None:
    names = [name for name, _ in model_of().named_parameters()]
    assert len(select_targets(names)) == 2 * len(TARGETS)
    assert select_targets(names, ["att.value", "ffn.value"]) == select_targets(names, ["value"])
    assert select_targets(names, ["gate"]) == ["blocks.0.att.gate", "blocks.1.att.gate"]
    with pytest.raises(UsageError, match=r"'query' is unknown; choose among att\.receptance"):
        select_targets(names, ["query"])
    old = [name for name, _ in model_of("4").named_parameters()]
    assert len(select_targets(old)) == 2 * 7
    with pytest.raises(UsageError, match=r"this model has no att\.gate"):
        select_targets(old, ["att.gate"])


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (2, 0.0), (2, float("nan"))])
def test_impossible_factors_are_refused(rank: int, alpha: float) -> None:
    model = model_of()
    with pytest.raises(UsageError, match="rank of at least 1 and an alpha above 0"):
        init_factors(model, names_of(model), rank, alpha, 0)


@pytest.mark.parametrize("version", ["5.0", "5.2", "6.0"])
def test_a_tuned_state_is_turned_once(version: str) -> None:
    model = model_of(version, tuned_state=True)
    tuned: dict[str, Tensor] = {n: t for n, t in model.named_parameters() if n.endswith("time_state")}
    begin = build_tuned_state(model.config, tuned)
    one = IDX[:1]
    assert torch.equal(model(one, begin)[0], model(one)[0])
    assert not torch.allclose(model(one, begin)[0], model_of(version)(one)[0])
    assert torch.equal(begin.tensors()["wkv"][1, 0, 2], tuned["blocks.1.att.time_state"][2].T)
