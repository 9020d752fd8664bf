"""The transformer: logits of a plain loop, any split of a text, ragged batches and separate documents."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from closeness import MODEL_TOLERANCE, UNIT_ROUNDOFF, assert_close_relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fledge.core.errors import ConfigError, StateError, UsageError
from fledge.models import BaseModel, KvState, ModelConfig, State, Transformer, WkvState, build, init_weights, zero_state
from fledge.models.layers import pack_linears

VOCAB = 23
CONFIG = ModelConfig("llama", VOCAB, n_layer=2, n_embd=24, dim_att=30, dim_ffn=40, n_head=3)


@lru_cache
def get_model() -> BaseModel:
    """A model with weights of the scale of a trained model, so that attention is far from uniform."""
    model, generator = build(CONFIG), torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        gain = 2.0 if "query" in name or "key" in name else 1.0
        parameter.data = 1 + 0.1 * normal if parameter.dim() == 1 else gain * normal * parameter.shape[1] ** -0.5
    return model.eval().requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(idx: Tensor, state: State | None = None, **options: object) -> tuple[Tensor, KvState]:
    logits, after = get_model()(idx, state, **options)
    assert isinstance(after, KvState)
    return logits, after


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert_close_relative(actual, expected, MODEL_TOLERANCE)


def assert_same_state(actual: State, expected: State) -> None:
    for field, tensor in expected.tensors().items():
        assert_close(actual.tensors()[field], tensor)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * weight


def rotate_plain(x: Tensor, position: int) -> Tensor:
    """The rotated query or key (N) of one head, computed with complex numbers made of channels n and n + N/2."""
    half = len(x) // 2
    angles = torch.tensor([position * 10000.0 ** (-2 * pair / len(x)) for pair in range(half)], dtype=torch.float64)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag))


def compute_logits_plain(ids: Tensor) -> Tensor:
    """The logits of one text in float64, computed from the equations, token by token and head by head."""
    p = {name: tensor.double() for name, tensor in get_model().state_dict().items()}
    H, N = CONFIG.n_head, CONFIG.head_size
    x = p["emb.weight"][ids]
    for layer in range(CONFIG.n_layer):
        block = {name.split(".", 2)[2]: t for name, t in p.items() if name.startswith(f"blocks.{layer}.")}
        h, mixed = rms_norm(x, block["ln1.weight"]), []
        q, k, v = (h @ block[f"att.{name}.weight"].T for name in ("query", "key", "value"))
        for t in range(len(ids)):
            heads = []
            for head in range(H):
                part = slice(head * N, (head + 1) * N)
                query = rotate_plain(q[t, part], t)
                scores = torch.stack([query @ rotate_plain(k[u, part], u) / N**0.5 for u in range(t + 1)])
                heads.append(torch.softmax(scores, 0) @ v[: t + 1, part])
            mixed.append(torch.cat(heads))
        x = x + torch.stack(mixed) @ block["att.output.weight"].T
        h = rms_norm(x, block["ln2.weight"])
        gate = h @ block["ffn.gate.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (h @ block["ffn.key.weight"].T)) @ block["ffn.value.weight"].T
    return rms_norm(x, p["ln_out.weight"]) @ p["head.weight"].T


def test_logits_equal_those_of_a_plain_loop() -> None:
    ids = tokens(1, 19)
    assert_close(run(ids)[0][0].double(), compute_logits_plain(ids[0]))


def test_a_split_at_any_position_gives_the_same_result() -> None:
    idx = tokens(2, 13)
    expected, expected_state = run(idx)
    for cut in range(14):
        first, middle = run(idx[:, :cut])
        second, after = run(idx[:, cut:], middle)
        assert_close(torch.cat((first, second), 1), expected)
        assert_same_state(after, expected_state)


def test_reading_token_by_token_equals_one_call() -> None:
    idx = tokens(1, 30)
    expected, _ = run(idx)
    state, steps = None, []
    for token in idx[0]:
        logits, state = run(token.view(1, 1), state)
        steps.append(logits)
    assert_close(torch.cat(steps, 1), expected)
    assert state is not None and state.capacity == 30 and state.end.tolist() == [[30]]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 17), min_size=1, max_size=4), has_state=st.booleans(), ragged=st.booleans())
def test_a_row_is_equal_alone_and_in_any_ragged_batch(lengths: list[int], has_state: bool, ragged: bool) -> None:
    B, longest = len(lengths), max(lengths)
    idx = tokens(B, longest, seed=1)
    state = None
    if has_state:
        lengths_before = torch.tensor([7, 0, 3, 5][:B]) if ragged else None
        _, state = run(tokens(B, 7, seed=2), lengths=lengths_before)
    logits, after = run(idx, state, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone, alone_after = run(idx[row : row + 1, :length], None if state is None else state.rows(row))
        assert_close(logits[row : row + 1, :length], alone)
        assert_same_state(after.rows(row), alone_after)


@pytest.mark.parametrize("has_state", [False, True])
def test_tokens_in_the_padding_change_no_bit(has_state: bool) -> None:
    lengths = torch.tensor([3, 0, 8])
    state = run(tokens(3, 6, seed=2), lengths=torch.tensor([2, 6, 0]))[1] if has_state else None
    is_token = (torch.arange(8) < lengths[:, None])[:, :, None]
    ids, other_ids = tokens(3, 8, seed=3), tokens(3, 8, seed=4)
    other_ids = torch.where(is_token[:, :, 0], ids, other_ids)
    (logits, after), (other_logits, other_after) = (run(idx, state, lengths=lengths) for idx in (ids, other_ids))
    assert not torch.equal(ids, other_ids) and torch.equal(logits * is_token, other_logits * is_token)
    for field, tensor in after.tensors().items():
        assert torch.equal(tensor, other_after.tensors()[field]), field
    longest = int(after.end.max())
    assert after.capacity == longest
    for row, end in enumerate(after.end[0].tolist()):
        assert after.keys[:, row, end:].abs().sum() == after.values[:, row, end:].abs().sum() == 0
        assert (after.keys[:, row, :end].abs().sum((0, 2, 3)) > 0).all()


def test_padding_in_the_state_changes_no_bit() -> None:
    """Values after the end of a row must not change any result."""
    _, state = run(tokens(2, 6), lengths=torch.tensor([2, 6]))
    keys, values = state.keys.clone(), state.values.clone()
    keys[:, 0, 2:], values[:, 0, 2:] = 1e6, -1e6
    changed = KvState(keys, values, state.begin, state.end)
    for length in (1, 4):
        (logits, after), (changed_logits, changed_after) = (
            run(tokens(2, length, seed=5), before) for before in (state, changed)
        )
        assert torch.equal(logits, changed_logits)
        for field, tensor in after.tensors().items():
            assert torch.equal(tensor, changed_after.tensors()[field]), field


def mark_documents(lengths: list[int]) -> Tensor:
    """(1, T) bool: True at the first token of each document."""
    document_start = torch.zeros(1, sum(lengths), dtype=torch.bool)
    document_start[0, [sum(lengths[:index]) for index in range(len(lengths))]] = True
    return document_start


def test_documents_in_one_row_are_independent() -> None:
    lengths = [4, 1, 6]
    idx = tokens(1, 11)
    logits, after = run(idx, document_start=mark_documents(lengths))
    start = 0
    for length in lengths:
        alone, _ = run(idx[:, start : start + length])
        assert_close(logits[:, start : start + length], alone)
        start += length
    assert (after.begin.tolist(), after.end.tolist()) == ([[5]], [[11]])
    more = tokens(1, 3, seed=6)
    expected, _ = run(torch.cat((idx[:, 5:], more), 1))
    assert_close(run(more, after)[0], expected[:, 6:])  # new tokens belong to the last document
    assert_close(run(more[:, :1], after)[0], expected[:, 6:7])


def test_a_split_of_documents_at_any_position_gives_the_same_result() -> None:
    idx, document_start = tokens(2, 9), torch.zeros(2, 9, dtype=torch.bool)
    document_start[0, [3, 4]], document_start[1, 8] = True, True
    expected, expected_state = run(idx, document_start=document_start)
    for cut in range(10):
        first, middle = run(idx[:, :cut], document_start=document_start[:, :cut])
        second, after = run(idx[:, cut:], middle, document_start=document_start[:, cut:])
        assert_close(torch.cat((first, second), 1), expected)
        assert_same_state(after, expected_state)


def test_a_document_start_in_the_padding_has_no_effect() -> None:
    idx, document_start = tokens(2, 6), torch.zeros(2, 6, dtype=torch.bool)
    document_start[0, 4], document_start[1, 2] = True, True
    logits, after = run(idx, document_start=document_start, lengths=torch.tensor([3, 5]))
    assert after.begin.tolist() == [[0, 2]]
    assert_close(logits[:1, :3], run(idx[:1, :3])[0])
    assert_close(logits[1:, 2:5], run(idx[1:, 2:5])[0])
    unmarked, _ = run(idx, document_start=torch.zeros_like(document_start))
    assert torch.equal(unmarked, run(idx)[0])


def test_states_of_different_lengths_can_be_stacked() -> None:
    states = [run(tokens(1, length, seed=length))[1] for length in (5, 0, 9)]
    stacked = State.stack(states)
    assert isinstance(stacked, KvState) and stacked.batch == 3 and stacked.end.tolist() == [[5, 0, 9]]
    idx = tokens(3, 4, seed=8)
    logits, after = run(idx, stacked)
    for row, state in enumerate(states):
        alone, alone_after = run(idx[row : row + 1], state)
        assert_close(logits[row : row + 1], alone)
        assert_same_state(after.rows(row), alone_after)
    pair = stacked.rows([1, 0])
    assert pair.capacity == 5 and torch.equal(pair.keys[:, 1:], states[0].keys)
    assert stacked.rows(slice(1, 2)).capacity == 0
    with pytest.raises(StateError, match="different families"):
        State.stack([stacked, zero_state(ModelConfig.finch(1, 32, head_size=8), 1)])


def test_states_are_saved_copied_and_never_modified(tmp_path: Path) -> None:
    _, state = run(tokens(2, 5), lengths=torch.tensor([5, 3]))
    assert state.nbytes == 2 * 5 * 4 * CONFIG.state_floats + 2 * 2 * 8
    state.save(tmp_path / "s")
    loaded = State.load(tmp_path / "s")
    copy, detached = state.clone(), state.to("cpu").detach()
    for other in (loaded, copy, detached):
        assert type(other) is KvState and other.end.dtype == torch.int64
        assert all(torch.equal(tensor, other.tensors()[field]) for field, tensor in state.tensors().items())
    run(tokens(2, 1), state)
    run(tokens(2, 9), state, lengths=torch.tensor([9, 3]), document_start=torch.ones(2, 9, dtype=torch.bool))
    assert all(torch.equal(tensor, copy.tensors()[field]) for field, tensor in state.tensors().items())
    empty = get_model().initial_state(3)
    empty.save(tmp_path / "e")
    assert State.load(tmp_path / "e").batch == 3


def test_invalid_states_are_rejected() -> None:
    _, state = run(tokens(1, 4))
    with pytest.raises(StateError, match="WkvState does not fit a Transformer model"):
        run(tokens(1, 2), zero_state(ModelConfig.finch(1, 32, head_size=8), 1))
    with pytest.raises(StateError, match="has 1 sequences, the input 2"):
        run(tokens(2, 2), state)
    with pytest.raises(StateError, match=r"state\.values has shape \(2, 1, 3, 3, 10\), .* needs \(2, 1, 4, 3, 10\)"):
        run(tokens(1, 2), KvState(state.keys, state.values[:, :, :3], state.begin, state.end))
    for begin, end in ((0, 5), (3, 2), (-1, 4)):
        wrong = KvState(state.keys, state.values, torch.tensor([[begin]]), torch.tensor([[end]]))
        with pytest.raises(StateError, match="its capacity of 4 tokens"):
            run(tokens(1, 2), wrong)
    with pytest.raises(StateError, match="KvState does not fit"):
        state.check(ModelConfig.finch(1, 32, head_size=8), 1)
    with pytest.raises(UsageError, match=r"document_start is torch\.bool of shape \(1, 3\)"):
        run(tokens(1, 2), document_start=torch.zeros(1, 3, dtype=torch.bool))
    assert not isinstance(state, WkvState)


@pytest.mark.parametrize(("batch", "length"), [(0, 0), (0, 1), (0, 9), (2, 0)])
def test_no_tokens_and_empty_batches_are_valid(batch: int, length: int) -> None:
    logits, state = run(tokens(batch, length))
    assert logits.shape == (batch, length, VOCAB) and state.batch == batch and state.capacity == length
    _, after = run(tokens(batch, length), state, lengths=torch.zeros(batch, dtype=torch.long))
    assert after.capacity == 0 and after.end.tolist() == [[0] * batch]


def test_last_returns_the_logits_of_the_last_token() -> None:
    lengths = torch.tensor([12, 1, 5])
    logits, _ = run(tokens(3, 12), lengths=lengths)
    last, _ = run(tokens(3, 12), lengths=lengths, last=True)
    assert_close(last[:, 0], logits[torch.arange(3), lengths - 1])


def test_every_parameter_and_the_state_receive_gradients() -> None:
    trained = build(CONFIG)
    trained.load_state_dict(get_model().state_dict())
    _, state = run(tokens(2, 6), lengths=torch.tensor([6, 4]))
    keys, values = state.keys.requires_grad_(), state.values.requires_grad_()
    logits, after = trained(tokens(2, 7), KvState(keys, values, state.begin, state.end), lengths=torch.tensor([0, 7]))
    (logits[1].square().sum() + after.tensors()["keys"].square().sum()).backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    for tensor in (keys, values):
        assert tensor.grad is not None and tensor.grad[:, 1, :4].abs().amin((0, 2, 3)).min() > 0
        assert tensor.grad[:, 1, 4:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_runs_in_another_dtype(dtype: torch.dtype) -> None:
    other = build(CONFIG)
    other.load_state_dict(get_model().state_dict())
    logits, state = other.to(dtype)(tokens(2, 9))
    assert logits.dtype == state.tensors()["keys"].dtype == torch.float32
    # Each of the 4 sub-layers and the head rounds weights, inputs and outputs to 16 bits.
    tolerance = MODEL_TOLERANCE if dtype == torch.float64 else 15 * UNIT_ROUNDOFF[dtype]
    assert_close_relative(logits, run(tokens(2, 9))[0], tolerance)


def test_a_packed_model_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.models.layers.WORTH_PACKING", 0)
    packed = build(CONFIG).eval().requires_grad_(False)
    packed.load_state_dict(get_model().state_dict())
    if reason := pack_linears(packed):
        pytest.skip(reason)
    assert_close(packed(tokens(2, 5))[0], run(tokens(2, 5))[0])


@pytest.mark.parametrize("make", [ModelConfig.finch, ModelConfig.eagle], ids=["finch", "eagle"])
@pytest.mark.parametrize(
    ("layers", "width", "vocab"), [(6, 256, 8192), (12, 768, 65536), (24, 4096, 65536), (3, 64, 97)]
)
def test_the_number_of_parameters_is_near_that_of_an_rwkv(
    make: Callable[[int, int, int], ModelConfig], layers: int, width: int, vocab: int
) -> None:
    rwkv = make(layers, width, vocab)
    counts = [sum(p.numel() for p in build(c, "meta").blocks.parameters()) for c in (rwkv, rwkv.as_transformer())]
    assert abs(counts[1] / counts[0] - 1) < 0.015
    config = rwkv.as_transformer()
    assert (config.n_layer, config.n_embd, config.vocab_size, config.n_head) == (layers, width, vocab, width // 64)
    if make == ModelConfig.finch:
        assert config == ModelConfig.transformer(layers, width, vocab)


def test_initialization_is_repeatable_and_has_the_standard_deviations() -> None:
    config = ModelConfig.transformer(8, 128, vocab_size=50, head_size=32)
    first, second = build(config), build(config)
    for model in (first, second):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        init_weights(model, seed=5)
    deviations = {name: tensor.std().item() for name, tensor in first.state_dict().items() if tensor.dim() == 2}
    for name, deviation in deviations.items():
        assert torch.equal(first.state_dict()[name], second.state_dict()[name])
        expected = 0.005 if name.endswith(("att.output.weight", "ffn.value.weight")) else 0.02
        assert deviation == pytest.approx(expected, rel=0.05), name
    assert all(bool((tensor == 1).all()) for tensor in first.state_dict().values() if tensor.dim() == 1)
    loss = torch.nn.functional.cross_entropy(first(torch.arange(50)[None])[0][0, :-1], torch.arange(1, 50))
    assert abs(loss.item() - 3.912) < 0.1  # ln 50


def test_invalid_sizes_are_rejected() -> None:
    sizes = {"vocab_size": 9, "n_layer": 1, "n_embd": 24, "dim_att": 24, "dim_ffn": 40}
    for wrong, message in (
        ({"n_head": 0}, "n_head is 0; it must divide dim_att"),
        ({"n_head": 8}, "head_size is 3; rotary positions need an even number"),
        ({"n_head": 3, "mix_rank": 4}, "mix_rank is 4, but a transformer has none"),
        ({"n_head": 3, "tuned_state": True}, "tuned_state is True, but a transformer has none"),
    ):
        with pytest.raises(ConfigError, match=message):
            ModelConfig("llama", **sizes, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"version is 4; .* exists for 5\.2 and 6\.0 only"):
        ModelConfig.rwkv4(1, 32).as_transformer()
    assert isinstance(get_model(), Transformer) and CONFIG.family == "Transformer"
