"""Every family: any split of a text and any ragged batch give the same logits and states, in float32."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from closeness import MODEL_TOLERANCE, UNIT_ROUNDOFF, assert_close_relative
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoints import random_checkpoint
from safetensors.torch import save_file

from fledge.core.errors import ConfigError, StateError, TokenizerError, UsageError
from fledge.kernels import wkv
from fledge.models import BaseModel, ModelConfig, State, WkvState, build, init_weights, zero_state
from fledge.models.layers import pack_linears

VOCAB = 23
SIZES = {"vocab_size": VOCAB, "n_layer": 2, "n_embd": 24, "dim_att": 24, "dim_ffn": 40}
CONFIGS = {
    "4": ModelConfig("4", **SIZES),
    "5.0": ModelConfig("5.0", **SIZES, n_head=3),
    "5.0-time_first": ModelConfig("5.0", **SIZES, n_head=3, bonus="time_first"),
    "5.1": ModelConfig("5.1", **SIZES, n_head=3),
    "5.2": ModelConfig("5.2", **SIZES, n_head=3),
    "6.0": ModelConfig("6.0", **SIZES, n_head=3, mix_rank=4, decay_rank=6),
    "6.0-tuned": ModelConfig("6.0", **SIZES, n_head=3, mix_rank=4, decay_rank=6, tuned_state=True),
}
# The tolerance of a model in 16 bits, in units of the roundoff. The 4 sub-layers and the head each round their weights,
# inputs and outputs, and norms of small heads can double an error. The largest error measured is 16, for RWKV-5.0.
ROUNDINGS = 30
every_family = pytest.mark.parametrize("name", CONFIGS)


@lru_cache
def get_model(name: str) -> BaseModel:
    config = CONFIGS[name]
    sizes = {"head_size": config.head_size or 8, "bonus": config.bonus, "tuned_state": config.tuned_state}
    if config.version == "6.0":
        sizes |= {"mix_rank": 4, "decay_rank": 6}
    tensors = random_checkpoint(
        config.version, n_layer=2, n_embd=24, dim_ffn=40, vocab_size=VOCAB, dtype=torch.float32, seed=3, **sizes
    )
    model = build(config)
    model.load_state_dict(tensors, strict=True)
    return model.eval().requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same_state(actual: State, expected: State) -> None:
    """Compare two states. aa and bb of RWKV-4 are scaled by exp(-pp), which may differ, so they are rescaled first."""
    actual_tensors, expected_tensors = actual.tensors(), expected.tensors()
    if "pp" in actual_tensors:
        for tensors in (actual_tensors, expected_tensors):
            pp = tensors.pop("pp")
            scale = torch.exp((pp - expected.tensors()["pp"]).clamp(-50, 50))
            tensors["aa"], tensors["bb"] = tensors["aa"] * scale, tensors["bb"] * scale
    for field in actual_tensors:
        assert_close_relative(actual_tensors[field], expected_tensors[field], MODEL_TOLERANCE, field)


@every_family
@settings(max_examples=15, deadline=None)
@given(length=st.integers(0, 40), data=st.data())
def test_any_split_of_a_text_gives_the_same_result(name: str, length: int, data: st.DataObject) -> None:
    model, idx = get_model(name), tokens(2, length)
    cut = data.draw(st.integers(0, length))
    expected, expected_state = model(idx)
    first, middle = model(idx[:, :cut])
    second, after = model(idx[:, cut:], middle)
    assert_close_relative(torch.cat((first, second), 1), expected, MODEL_TOLERANCE, "logits")
    assert_same_state(after, expected_state)


@every_family
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 33), min_size=1, max_size=4), has_state=st.booleans())
def test_a_row_is_equal_alone_and_in_any_ragged_batch(name: str, lengths: list[int], has_state: bool) -> None:
    model, longest = get_model(name), max(lengths)
    idx = tokens(len(lengths), longest, seed=1)
    state = model(tokens(len(lengths), 7, seed=2))[1] if has_state else None
    logits, after = model(idx, state, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        row_state = None if state is None else state.rows(row)
        alone, alone_after = model(idx[row : row + 1, :length], row_state)
        assert_close_relative(logits[row : row + 1, :length], alone, MODEL_TOLERANCE, "logits")
        assert_same_state(after.rows(row), alone_after)


@every_family
def test_padding_does_not_change_the_state(name: str) -> None:
    model = get_model(name)
    for state in (model(tokens(2, 9))[1], model.initial_state(2)):
        _, after = model(tokens(2, 20, seed=4), state, lengths=torch.tensor([0, 20]))
        for field, tensor in after.tensors().items():
            assert torch.equal(tensor[:, 0], state.tensors()[field][:, 0]), field
            assert tensor.isfinite().all(), field


@every_family
def test_gradients_are_finite_if_a_row_is_empty(name: str) -> None:
    model = build(CONFIGS[name])
    model.load_state_dict(get_model(name).state_dict())
    logits, _ = model(tokens(2, 9), lengths=torch.tensor([0, 9]))
    logits[1].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_family
@pytest.mark.parametrize("length", [0, 1, 9])
def test_an_empty_batch_is_valid(name: str, length: int) -> None:
    logits, state = get_model(name)(tokens(0, length))
    assert logits.shape == (0, length, VOCAB) and state.batch == 0
    if length:
        assert get_model(name)(tokens(0, length), lengths=torch.zeros(0, dtype=torch.long), last=True)[0].shape[0] == 0


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_runs_in_another_dtype(name: str, dtype: torch.dtype) -> None:
    model = build(CONFIGS[name])
    model.load_state_dict(get_model(name).state_dict())
    logits, state = model.to(dtype)(tokens(2, 9))
    assert logits.dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in state.tensors().values())
    expected, _ = get_model(name)(tokens(2, 9))
    tolerance = MODEL_TOLERANCE if dtype == torch.float64 else ROUNDINGS * UNIT_ROUNDOFF[dtype]
    assert_close_relative(logits, expected, tolerance, "logits")


@every_family
def test_reading_token_by_token_equals_one_call(name: str) -> None:
    model, idx = get_model(name), tokens(1, 30)
    expected, _ = model(idx)
    state, steps = None, []
    for token in idx[0]:
        logits, state = model(token.view(1, 1), state)
        steps.append(logits)
    assert_close_relative(torch.cat(steps, 1), expected, MODEL_TOLERANCE, "logits")


@every_family
def test_last_returns_the_logits_of_the_last_token(name: str) -> None:
    model, idx = get_model(name), tokens(3, 12)
    lengths = torch.tensor([12, 1, 5])
    logits, _ = model(idx, lengths=lengths)
    last, _ = model(idx, lengths=lengths, last=True)
    assert_close_relative(last[:, 0], logits[torch.arange(3), lengths - 1], MODEL_TOLERANCE, "logits")
    assert model(idx, last=True)[0].shape == (3, 1, VOCAB)


@every_family
def test_the_input_state_is_not_modified(name: str) -> None:
    model = get_model(name)
    state = model(tokens(2, 5))[1]
    copy = state.clone()
    model(tokens(2, 1), state)
    model(tokens(2, 50), state, lengths=torch.tensor([50, 3]))
    for field, tensor in state.tensors().items():
        assert torch.equal(tensor, copy.tensors()[field])


@every_family
def test_every_parameter_and_the_state_receive_gradients(name: str) -> None:
    model = build(CONFIGS[name])
    model.load_state_dict(get_model(name).state_dict())
    state = model(tokens(2, 6))[1].detach()
    state = type(state)(**{k: t.clone().requires_grad_() for k, t in state.tensors().items()})
    logits, after = model(tokens(2, 17), state)
    (logits.square().sum() + sum(t.square().sum() for t in after.tensors().values())).backward()
    for parameter_name, parameter in model.named_parameters():
        if not parameter_name.endswith("time_state"):  # used only without a state
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
    for field, tensor in state.tensors().items():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), field


def test_a_tuned_state_is_transposed_in_the_initial_state() -> None:
    model = get_model("6.0-tuned")
    state = model.initial_state(2)
    assert isinstance(state, WkvState)
    for layer, block in enumerate(model.blocks):
        for row in range(2):
            assert torch.equal(state.wkv[layer, row], block.att.time_state.transpose(1, 2))
    tuned_logits, _ = model(tokens(2, 4))
    zero_logits, _ = model(tokens(2, 4), zero_state(model.config, 2))
    assert not torch.allclose(tuned_logits, zero_logits)


@pytest.mark.parametrize("version", ["4", "5.2", "6.0"])
@pytest.mark.parametrize("layers", [1, 3])
def test_initialization_is_repeatable_and_starts_at_the_uniform_loss(version: str, layers: int) -> None:
    sizes = {} if version == "4" else {"head_size": 16}
    make_config = {"4": ModelConfig.rwkv4, "5.2": ModelConfig.eagle, "6.0": ModelConfig.finch}[version]
    config = make_config(layers, 64, vocab_size=50, **sizes)
    first, second = build(config), build(config)
    for model in (first, second):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        init_weights(model, seed=5)
    for (name, weight), (_, repeated) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(weight, repeated), name
        assert weight.isfinite().all(), name
    logits, _ = first(torch.arange(50).view(1, 50))
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.arange(1, 50))
    assert abs(loss.item() - 3.912) < 0.25  # ln 50


def test_initial_values_follow_the_formulas() -> None:
    model = build(ModelConfig.finch(3, 64, vocab_size=50, head_size=16))
    init_weights(model, seed=0)
    decay = model.blocks[1].att.time_decay.flatten()
    assert decay[0].item() == -6 and abs(decay[-1].item() + 1) < 1e-6
    bonus = model.blocks[0].att.time_faaaa.flatten()
    torch.testing.assert_close(bonus[:4], torch.tensor([0.0, 0.1, -0.1, 0.0]))
    assert model.blocks[2].ffn.value.weight.abs().max() == 0
    torch.testing.assert_close(model.blocks[0].att.time_maa_k.flatten(), 1 - torch.arange(64) / 64)
    torch.testing.assert_close(model.blocks[0].att.ln_x.weight[0].item(), (1 / 3) ** 0.7)


def test_parameter_counts_match_the_published_models() -> None:
    """Eagle 0.4B has 461,721,600 parameters and Finch 1.6B 1,599,873,024 (paper, table 11)."""
    for config, count in (
        (ModelConfig.eagle(24, 1024), 461_721_600),
        (ModelConfig.finch(24, 2048), 1_599_873_024),
        (ModelConfig.finch(32, 4096), 7_635_746_816),
    ):
        assert sum(p.numel() for p in build(config, device="meta").parameters()) == count
    assert ModelConfig.finch(24, 2048).state_floats == 3_244_032


def test_the_stream_is_float32_with_bfloat16_matrices() -> None:
    model = build(CONFIGS["6.0"])
    model.load_state_dict(get_model("6.0").state_dict())
    expected, _ = model(tokens(1, 20))
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and parameter.dim() == 2:
            parameter.data = parameter.data.bfloat16()
    logits, state = model(tokens(1, 20))
    assert logits.dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in state.tensors().values())
    assert_close_relative(logits, expected, ROUNDINGS * UNIT_ROUNDOFF[torch.bfloat16], "logits")


@every_family
def test_a_packed_model_gives_the_same_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.models.layers.WORTH_PACKING", 0)
    model = build(CONFIGS[name]).eval().requires_grad_(False)
    model.load_state_dict(get_model(name).state_dict())
    if reason := pack_linears(model):
        pytest.skip(reason)
    assert model.head.weight is None and pack_linears(model) is None  # packing again changes nothing
    for length in (1, 20):
        logits, after = model(tokens(2, length))
        expected, expected_state = get_model(name)(tokens(2, length))
        assert_close_relative(logits, expected, MODEL_TOLERANCE, "logits")
        assert_same_state(after, expected_state)


def test_invalid_arguments_are_rejected() -> None:
    model = get_model("6.0")
    with pytest.raises(TokenizerError, match=f"id {VOCAB} .*vocabulary of {VOCAB}"):
        model(torch.tensor([[1, VOCAB]]))
    with pytest.raises(TokenizerError, match="id -1 "):
        model(torch.tensor([[-1]]))
    with pytest.raises(StateError, match="Rwkv4State does not fit"):
        model(tokens(1, 2), zero_state(CONFIGS["4"], 1))
    with pytest.raises(StateError, match="has 2 sequences, the input 1"):
        model(tokens(1, 2), zero_state(CONFIGS["6.0"], 2))
    with pytest.raises(StateError, match=r"state\.att_shift has shape \(1, 1, 24\).*\(2, 1, 24\)"):
        model(
            tokens(1, 2),
            zero_state(ModelConfig("6.0", **{**SIZES, "n_layer": 1}, n_head=3, mix_rank=4, decay_rank=6), 1),
        )
    with pytest.raises(UsageError, match="lengths must hold 2 numbers between 0 and 3"):
        model(tokens(2, 3), lengths=torch.tensor([1, 4]))
    with pytest.raises(UsageError, match="last=True"):
        model(tokens(1, 0), last=True)
    with pytest.raises(UsageError, match=r"\(3,\)"):
        model(torch.tensor([1, 2, 3]))
    with pytest.raises(ConfigError, match=r"no initialization for version 5\.1"):
        init_weights(build(CONFIGS["5.1"]))


def test_states_can_be_split_and_stacked() -> None:
    state = get_model("6.0")(tokens(3, 4))[1]
    assert state.batch == 3
    assert state.nbytes == 3 * 4 * CONFIGS["6.0"].state_floats
    stacked = type(state).stack([state.rows(2), state.rows([0, 1])])
    for field, tensor in state.tensors().items():
        assert torch.equal(stacked.tensors()[field], tensor[:, [2, 0, 1]])
        assert torch.equal(state.rows(slice(1, 3)).tensors()[field], tensor[:, 1:3])
    with pytest.raises(StateError, match="different families"):
        State.stack([state.rows(0), zero_state(CONFIGS["4"], 1)])
    with pytest.raises(StateError, match="empty list"):
        WkvState.stack([])
    with pytest.raises(StateError, match=r"rows \[3\].*3 sequences"):
        state.rows(3)
    assert state != stacked and state == state


@every_family
def test_a_saved_state_is_loaded_unchanged(name: str, tmp_path: Path) -> None:
    state = get_model(name)(tokens(2, 5))[1]
    state.save(tmp_path / "s")
    loaded = State.load(tmp_path / "s")
    assert type(loaded) is type(state)
    for field, tensor in state.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[field])


def test_files_without_a_state_are_rejected(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x")
    save_file({"x": torch.zeros(1)}, tmp_path / "y", metadata={"fledge_state": "WkvState"})
    (tmp_path / "z").write_bytes(b"junk")
    for file, message in (
        ("x", "not a state"),
        ("y", "contains x, not att_shift"),
        ("z", "cannot be"),
        ("q", "cannot be"),
    ):
        with pytest.raises(StateError, match=message):
            State.load(tmp_path / file)


def test_invalid_sizes_are_rejected() -> None:
    with pytest.raises(ConfigError, match="n_embd is 160; it must be a multiple of head_size = 64"):
        ModelConfig.finch(2, 160)
    with pytest.raises(ConfigError, match="stores its bonus as time_faaaa"):
        ModelConfig("6.0", **SIZES, n_head=3, mix_rank=4, decay_rank=6, bonus="time_first")
    with pytest.raises(ConfigError, match="RWKV-4 has no matrix state"):
        ModelConfig("4", **SIZES, tuned_state=True)
    with pytest.raises(ConfigError, match="norm_eps is -1"):
        ModelConfig("4", **SIZES, norm_eps=-1)
    with pytest.raises(ConfigError, match="n_head is 5; it must divide dim_att = 24"):
        ModelConfig("5.2", **SIZES, n_head=5)


def test_the_shape_of_every_field_is_checked() -> None:
    model = get_model("6.0")
    state = zero_state(CONFIGS["6.0"], 2)
    wrong = WkvState(state.att_shift, state.wkv[:, :1], state.ffn_shift)
    with pytest.raises(StateError, match=r"state\.wkv has shape \(2, 1, 3, 8, 8\)"):
        model(tokens(2, 3), wrong)


def test_a_packed_model_gives_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.models.layers.WORTH_PACKING", 0)
    model = build(CONFIGS["6.0"])
    model.load_state_dict(get_model("6.0").state_dict())
    if reason := pack_linears(model):
        pytest.skip(reason)
    logits, state = model(tokens(1, 3))  # without no_grad: the parameters require no gradient
    assert not logits.requires_grad
    tracked = WkvState(state.att_shift.clone().requires_grad_(), state.wkv, state.ffn_shift)
    with pytest.raises(UsageError, match="pack=False"):
        model(tokens(1, 3), tracked)


def test_scaled_keys_are_multiplied_by_the_clamped_exp_of_the_raw_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = get_model("6.0")
    scaled = build(replace(plain.config, scaled_keys=True)).requires_grad_(False)
    scaled.load_state_dict(plain.state_dict())
    logits, state = scaled(tokens(2, 9))

    def wkv_with_scaled_keys(
        r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor, base: torch.Tensor, *rest: torch.Tensor
    ) -> object:
        raw = x + base.view(x.shape[2:])
        assert raw.min() < 0 < raw.max()  # below and above the bend
        return wkv(r, k * torch.exp(raw).clamp(max=1.0), v, -torch.exp(raw), *rest)

    monkeypatch.setattr("fledge.models.finch.wkv_with_decay", wkv_with_scaled_keys)
    expected, expected_state = plain(tokens(2, 9))
    assert_close_relative(logits, expected, MODEL_TOLERANCE, "logits")
    assert_same_state(state, expected_state)
    with pytest.raises(ConfigError, match=r"scaled_keys is set, but .* 6\.0 only"):
        replace(CONFIGS["5.2"], scaled_keys=True)
