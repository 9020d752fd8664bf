"""Detection of version and sizes from names and shapes in any order, and errors that name the problem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_checkpoints import KINDS, make_tensors
from torch import Tensor

from fledge.checkpoint import detect, get_expected_shapes
from fledge.core.errors import CheckpointError, UnsupportedError
from fledge.models import ModelConfig, build

Shapes = dict[str, tuple[int, ...]]


def get_shapes(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    version = draw(st.sampled_from(["4", "5.0", "5.1", "5.2", "6.0"]))
    size = st.integers(1, 9)
    heads, head_size = draw(size), draw(st.integers(2, 9))
    return ModelConfig(
        version,
        vocab_size=draw(size),
        n_layer=draw(st.integers(1, 4)),
        n_embd=draw(size),
        dim_att=heads * head_size,
        dim_ffn=draw(size),
        n_head=0 if version == "4" else heads,
        mix_rank=draw(size) if version == "6.0" else 0,
        decay_rank=draw(size) if version == "6.0" else 0,
        bonus=draw(st.sampled_from(["time_first", "time_faaaa"])) if version in ("5.0", "5.1") else "time_faaaa",
        tuned_state=version != "4" and draw(st.booleans()),
    )


@given(config=configs(), order=st.randoms(use_true_random=False))
def test_any_model_is_recognized_in_any_order_of_keys(config: ModelConfig, order: object) -> None:
    items = list(get_expected_shapes(config).items())
    order.shuffle(items)  # type: ignore[attr-defined]
    assert detect(dict(items)) == config


@given(config=configs())
def test_the_table_agrees_with_the_models(config: ModelConfig) -> None:
    parameters = {name: tuple(tensor.shape) for name, tensor in build(config, "meta").state_dict().items()}
    assert parameters == get_expected_shapes(config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("alphabetical", [False, True])
def test_checkpoints_of_every_kind_are_recognized(kind: str, layers: int, alphabetical: bool) -> None:
    tensors = make_tensors(kind, n_layer=layers)
    shapes = get_shapes(tensors)
    config = detect(dict(sorted(shapes.items())) if alphabetical else shapes)
    assert config.version == KINDS[kind]["version"]
    assert (config.n_layer, config.n_embd, config.vocab_size) == (layers, 24, 37)
    assert config.n_head == (0 if kind == "4" else 3)
    assert config.tuned_state == ("tuned" in kind)
    assert config.bonus == ("time_first" if "time_first" in kind else "time_faaaa")
    assert (config.mix_rank, config.decay_rank) == ((8, 12) if kind[0] == "6" else (0, 0))
    assert list(get_expected_shapes(config).items()) == list(shapes.items())  # also the official order


def test_missing_tensors_are_named_with_their_shape() -> None:
    shapes = get_shapes(make_tensors("6.0"))
    for name in ("blocks.1.att.key.weight", "blocks.0.att.key.weight", "blocks.2.ffn.time_maa_k", "ln_out.bias"):
        others = {other: shape for other, shape in shapes.items() if other != name}
        with pytest.raises(CheckpointError, match=r"x.pth is not a complete RWKV-6 Finch 6.0 .* 3 layers") as caught:
            detect(others, "x.pth")
        assert f"missing: {name} {shapes[name]}" in str(caught.value)


def test_many_missing_tensors_are_counted() -> None:
    shapes = {
        name: shape
        for name, shape in get_shapes(make_tensors("5.2")).items()
        if ".ffn." not in name or "weight" in name
    }
    with pytest.raises(CheckpointError, match=r"time_mix_k \(1, 1, 24\).* and 1 more"):
        detect(shapes)


def test_unexpected_and_misshapen_tensors_are_named() -> None:
    shapes = get_shapes(make_tensors("5.2"))
    shapes |= {"blocks.0.att.extra": (5,), "blocks.1.ffn.key.weight": (96, 23)}
    with pytest.raises(CheckpointError) as caught:
        detect(shapes)
    assert "unexpected: 'blocks.0.att.extra' (5,)" in str(caught.value)
    assert "wrong shape: blocks.1.ffn.key.weight is (96, 23) instead of (64, 24)" in str(caught.value)


def test_names_in_errors_are_escaped() -> None:
    shapes = get_shapes(make_tensors("5.2"))
    for strange in ({"a\x1b[2J\nb": (1,)}, shapes | {"blocks.0.\x1b[2J\n": (1,)}):
        with pytest.raises(CheckpointError) as caught:
            detect(strange)
        assert str(caught.value).isprintable()


def test_the_wrong_tensor_of_a_one_layer_model_is_reported() -> None:
    shapes = get_shapes(make_tensors("5.2", n_layer=1)) | {"blocks.0.att.key.weight": (25, 24)}
    with pytest.raises(
        CheckpointError, match=r"wrong shape: blocks.0.att.key.weight is \(25, 24\) instead of \(24, 24\)"
    ):
        detect(shapes)


def test_a_missing_block_is_named() -> None:
    shapes = {
        name: s for name, s in get_shapes(make_tensors("5.1", n_layer=5)).items() if not name.startswith("blocks.3.")
    }
    with pytest.raises(CheckpointError, match=r"block 3 of 5 is missing \(they are numbered 0 to 4\)"):
        detect(shapes)


def test_a_huge_block_number_is_rejected_quickly() -> None:
    shapes = get_shapes(make_tensors("4")) | {"blocks.999999.att.key.weight": (24, 24)}
    with pytest.raises(CheckpointError, match=r"blocks 3, 4, 5, 6, 7, ... of 1000000 are missing"):
        detect(shapes)


def test_different_vocabulary_sizes_are_both_named() -> None:
    shapes = get_shapes(make_tensors("6.0")) | {"head.weight": (41, 24)}
    with pytest.raises(CheckpointError, match=r"emb.weight has 37 rows but head.weight has 41"):
        detect(shapes)


def test_heads_that_do_not_divide_the_width_are_rejected() -> None:
    shapes = get_shapes(make_tensors("5.1"))
    shapes |= {name: (7,) for name in shapes if name.endswith(("time_decay", "time_faaaa"))}
    with pytest.raises(CheckpointError, match="n_head is 7; it must divide dim_att = 24"):
        detect(shapes)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["emb.weight", "blocks.0.att.r_k", "blocks.0.att.x_r"], "RWKV-7 is not supported yet"),
        (["emb.weight", "blocks.0.att.time_maa_x", "blocks.0.att.gate_w1"], "x060a"),
        (["emb.weight", "blocks.0.att.time_maa_x", "blocks.0.att.time_maa_rkvw_w1"], "x060b or x060c"),
        (["blocks.0.att.key.lora_A", "blocks.0.att.key.lora_B"], "LoRA adapter"),
        (["rwkv.emb.weight", "rwkv.blocks.0.att.key.weight", "proj.weight", "vit.x"], "VisualRWKV"),
        (["emb.weight", "blocks.0.att.key.weight", "blocks.0.att.key.weight_mx"], "rwkv package"),
    ],
)
def test_known_but_unsupported_files_are_named(names: list[str], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        detect(dict.fromkeys(names, (4, 4)), "x.pth")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.0.self_attn.q_proj.weight"], "looked for emb.weight.*found 'model.layers.0.self_attn"),
        ([], "found no tensor at all"),
        (["emb.weight"], "no tensor named blocks"),
        (["blocks.0.att.time_state", "blocks.1.att.time_state"], "a tuned state, not a whole model"),
        (["emb.weight", "blocks.0.att.value.bias"], "cannot determine the width|cannot determine the attention width"),
    ],
)
def test_files_that_are_not_models_are_rejected(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        detect(dict.fromkeys(names, (4, 4)), "x.pth")


def test_dtypes_and_values_have_no_effect() -> None:
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in make_tensors("6.0").items()}
    assert detect(get_shapes(tensors)).version == "6.0"
