"""LoRA factors equal merged weights and share the memory of the model. A tuned state is transposed once."""

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


def make_model(version: str = "6.0", **sizes: object) -> BaseModel:
    tensors = random_checkpoint(version, n_layer=2, n_embd=24, dim_ffn=40, vocab_size=VOCAB, **sizes)  # type: ignore[arg-type]
    model = assemble(detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors)
    assert isinstance(model, BaseModel)
    return model.requires_grad_(False)


def list_linears(model: BaseModel) -> list[str]:
    return select_targets([name for name, _ in model.named_parameters()])


def random_factors(model: BaseModel, rank: int = 3, seed: int = 0) -> dict[str, LoraFactors]:
    """Factors with a visible effect on the logits."""
    untrained = init_factors(model, list_linears(model), rank, 2.0 * rank, seed)
    generator = torch.Generator().manual_seed(seed + 50)
    return {
        name: LoraFactors(one.down, 0.3 * torch.randn(one.up.shape, generator=generator), one.scale)
        for name, one in untrained.items()
    }


@every_version
def test_factors_equal_merged_weights(version: str) -> None:
    model = make_model(version)
    factors = random_factors(model)
    assert len(factors) == 2 * (8 if version not in ("4", "5.0") else 7)
    merged = make_model(version)
    for name, one in factors.items():
        weight = merged.get_parameter(f"{name}.weight")
        weight.copy_(merge_weight(weight, one))
    before, adapted = model(IDX)[0], build_adapted_model(model, factors)(IDX)[0]
    assert (adapted - before).abs().max() > 0.3
    assert_close_relative(adapted, merged(IDX)[0], MODEL_TOLERANCE)
    assert torch.equal(model(IDX)[0], before)


def test_untrained_factors_change_nothing() -> None:
    model = make_model()
    factors = init_factors(model, list_linears(model), 5, 10.0, 0)
    assert torch.equal(build_adapted_model(model, factors)(IDX)[0], model(IDX)[0])
    down = factors["blocks.1.ffn.value"].down
    assert down.shape == (5, 40) and 0.9 * 40**-0.5 < down.abs().max() <= 40**-0.5
    assert torch.equal(down, init_factors(model, list_linears(model), 5, 10.0, 0)["blocks.1.ffn.value"].down)
    assert not torch.equal(down, init_factors(model, list_linears(model), 5, 10.0, 1)["blocks.1.ffn.value"].down)


def test_adapted_models_share_the_memory_of_the_weights() -> None:
    model = make_model()
    addresses = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    first, second = (
        build_adapted_model(model, random_factors(model)),
        build_adapted_model(model, random_factors(model, seed=1)),
    )
    for adapted in (first, second):
        shared = {name: weight.data_ptr() for name, weight in adapted.named_parameters() if ".lora_" not in name}
        assert shared == addresses
    assert not torch.equal(first(IDX)[0], second(IDX)[0])
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert "blocks.1.att.gate.lora_A" in first.state_dict() and first.config == model.config


def test_the_effects_of_two_adapters_add_up() -> None:
    model = make_model()
    first = random_factors(model, rank=2)
    second = {name: one for name, one in random_factors(model, rank=3, seed=1).items() if ".ffn." in name}
    both = build_adapted_model(model, combine_factors([first, second]))
    assert_close_relative(
        build_adapted_model(build_adapted_model(model, first), second)(IDX)[0], both(IDX)[0], MODEL_TOLERANCE
    )
    assert both.get_parameter("blocks.0.ffn.key.lora_A").shape == (5, 24)
    assert both.get_parameter("blocks.0.att.key.lora_A").shape == (2, 24)
    merged = make_model()
    for factors in (first, second):
        for name, one in factors.items():
            weight = merged.get_parameter(f"{name}.weight")
            weight.copy_(merge_weight(weight, one))
    assert_close_relative(both(IDX)[0], merged(IDX)[0], MODEL_TOLERANCE)


def test_parts_replace_parameters() -> None:
    model = make_model()
    part = model.blocks[0].att.time_maa_x + 0.5  # type: ignore[union-attr,operator]
    adapted = build_adapted_model(model, {}, {"blocks.0.att.time_maa_x": part})
    expected = make_model()
    expected.get_parameter("blocks.0.att.time_maa_x").add_(0.5)
    assert torch.equal(adapted(IDX)[0], expected(IDX)[0]) and not torch.equal(adapted(IDX)[0], model(IDX)[0])


def test_factors_apply_to_packed_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.models.layers.WORTH_PACKING", 0)
    unpacked, packed = make_model(), make_model()
    if reason := pack_linears(packed):
        pytest.skip(reason)
    factors = random_factors(unpacked)
    adapted = build_adapted_model(packed, factors)
    assert_close_relative(adapted(IDX)[0], build_adapted_model(unpacked, factors)(IDX)[0], MODEL_TOLERANCE)
    assert adapted.head.packed is packed.head.packed
    parts = {"blocks.0.att.value.weight": torch.randn_like(unpacked.blocks[0].att.value.weight)}
    logits, expected = (
        build_adapted_model(packed, factors, parts)(IDX)[0],
        build_adapted_model(unpacked, factors, parts)(IDX)[0],
    )
    assert_close_relative(logits, expected, MODEL_TOLERANCE)
    assert_close_relative(packed(IDX)[0], unpacked(IDX)[0], MODEL_TOLERANCE)  # the packed model has not changed


def test_only_the_factors_receive_gradients() -> None:
    model = copy_sharing_weights(make_model())
    add_lora(model, random_factors(model))
    model(IDX)[0].sum().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.abs().max() > 0)) == (".lora_" in name), name


def test_merging_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator)
    factors = LoraFactors(torch.randn(2, 7, generator=generator), torch.randn(5, 2, generator=generator), 0.5)
    exact = weight.bfloat16().double() + 0.5 * factors.up.double() @ factors.down.double()
    merged = merge_weight(weight.bfloat16(), factors)
    assert merged.dtype == torch.bfloat16
    # One rounding of each number to bfloat16, after float32 sums of numbers below 8.
    torch.testing.assert_close(
        merged.double(), exact, rtol=UNIT_ROUNDOFF[torch.bfloat16], atol=8 * UNIT_ROUNDOFF[torch.float32]
    )


def test_targets_are_selected_by_full_and_short_names() -> None:
    names = [name for name, _ in make_model().named_parameters()]
    assert len(select_targets(names)) == 2 * len(TARGETS)
    assert select_targets(names, ["att.value", "ffn.value"]) == select_targets(names, ["value"])
    assert select_targets(names, ["gate"]) == ["blocks.0.att.gate", "blocks.1.att.gate"]
    with pytest.raises(UsageError, match=r"'query' is unknown; choose among att\.receptance"):
        select_targets(names, ["query"])
    rwkv4_names = [name for name, _ in make_model("4").named_parameters()]
    assert len(select_targets(rwkv4_names)) == 2 * 7
    with pytest.raises(UsageError, match=r"this model has no att\.gate"):
        select_targets(rwkv4_names, ["att.gate"])


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (2, 0.0), (2, float("nan"))])
def test_an_invalid_rank_or_alpha_is_rejected(rank: int, alpha: float) -> None:
    model = make_model()
    with pytest.raises(UsageError, match="rank of at least 1 and an alpha above 0"):
        init_factors(model, list_linears(model), rank, alpha, 0)


@pytest.mark.parametrize("version", ["5.0", "5.2", "6.0"])
def test_a_tuned_state_is_transposed_once(version: str) -> None:
    model = make_model(version, tuned_state=True)
    tuned: dict[str, Tensor] = {
        name: weight for name, weight in model.named_parameters() if name.endswith("time_state")
    }
    state = build_tuned_state(model.config, tuned)
    prompt = IDX[:1]
    assert torch.equal(model(prompt, state)[0], model(prompt)[0])
    assert not torch.allclose(model(prompt, state)[0], make_model(version)(prompt)[0])
    assert torch.equal(state.tensors()["wkv"][1, 0, 2], tuned["blocks.1.att.time_state"][2].T)
