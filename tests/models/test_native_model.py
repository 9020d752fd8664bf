"""The native model equals the torch model for every version and instruction set, with the same bits in any batch."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from closeness import assert_close_relative, relative_error
from native_library import every_instruction_set, needs_native, use_instruction_set
from random_checkpoints import VERSIONS, random_checkpoint
from torch import Tensor

from fledge.checkpoint import ModelWeights, assemble, detect
from fledge.checkpoint.quantization.quantizer import quantize_tensors
from fledge.core.errors import CheckpointError, StateError, TokenizerError, UsageError
from fledge.models import BaseModel
from fledge.models.buffer_pool import MAX_FREE_BLOCKS, BufferPool
from fledge.models.config import ModelConfig
from fledge.models.native_model import NativeModel

pytestmark = needs_native

VOCAB = 77
# (layers, width, head size): widths that are a multiple of vectors and panels, and widths that are not.
SIZES = [(3, 40, 8), (2, 128, 64), (2, 72, 24)]
# Relative to the largest value. Rounding is bounded by 2 * layers * terms * 2**-24 on each side (see closeness.py),
# 4.6e-5 for the smallest case here (3 layers, sums of 128 terms). The largest differences measured are 1.2e-5 and
# 2.5e-6.
LOGITS_TOLERANCE, STATE_TOLERANCE = 3e-5, 1e-5


def make_weights(
    version: str, layers: int, width: int, head: int, **options: object
) -> tuple[ModelConfig, dict[str, Tensor]]:
    tensors = random_checkpoint(
        version,
        n_layer=layers,
        n_embd=width,
        head_size=head,
        vocab_size=VOCAB,
        seed=3,
        **options,  # type: ignore[arg-type]
    )
    return detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@every_instruction_set
def test_scaled_keys_equal_the_torch_model(instruction_set: str) -> None:
    config, tensors = make_weights("6.0", 2, 72, 24)
    scaled, idx = replace(config, scaled_keys=True), tokens(3, 20)
    with torch.no_grad(), use_instruction_set(instruction_set):
        logits, state = NativeModel(scaled, tensors)(idx)
        expected, expected_state = assemble(scaled, tensors)(idx)
        plain, _ = NativeModel(config, tensors)(idx)
    assert_close_relative(logits, expected, LOGITS_TOLERANCE, "logits")
    assert relative_error(plain, expected) > 100 * LOGITS_TOLERANCE
    for name, tensor in state.tensors().items():
        assert_close_relative(tensor, expected_state.tensors()[name], STATE_TOLERANCE, name)


@every_instruction_set
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_and_states_equal_the_torch_model(
    instruction_set: str, version: str, sizes: tuple[int, int, int]
) -> None:
    config, tensors = make_weights(version, *sizes)
    torch_model, idx = assemble(config, tensors), tokens(3, 50)
    with torch.no_grad(), use_instruction_set(instruction_set):
        logits, state = NativeModel(config, tensors)(idx)
        expected, expected_state = torch_model(idx)
    assert_close_relative(logits, expected, LOGITS_TOLERANCE)
    for name, tensor in state.tensors().items():
        assert_close_relative(tensor, expected_state.tensors()[name], STATE_TOLERANCE, name)


@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_a_width_of_2560_with_40_heads_equals_the_torch_model(version: str) -> None:
    config, tensors = make_weights(version, 1, 2560, 64, dim_ffn=200)
    idx = tokens(2, 5)
    with torch.no_grad():
        expected, _ = assemble(config, tensors)(idx)
    assert_close_relative(NativeModel(config, tensors)(idx)[0], expected, LOGITS_TOLERANCE)


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16_matrices_round_as_torch_does(version: str) -> None:
    config, tensors = make_weights(version, 2, 72, 24, dtype=torch.bfloat16)
    idx = tokens(2, 30)
    with torch.no_grad():
        rounded, exact = assemble(config, tensors)(idx)[0], assemble(config, tensors, dtype=torch.float32)(idx)[0]
    native = NativeModel(config, tensors)
    assert native.dtype == torch.bfloat16 and "bfloat16" in native.formats
    assert_close_relative(native(idx)[0], rounded, 2e-2)
    # float32 arithmetic on weights that stay bfloat16 in memory is as exact as with float32 weights.
    native = NativeModel(config, tensors, matrix_dtype=torch.float32)
    assert native.dtype == torch.float32 and set(native.formats) == {"bfloat16 exact"}
    assert_close_relative(native(idx)[0], exact, LOGITS_TOLERANCE)


@pytest.mark.parametrize("version", VERSIONS)
def test_float16_weights_are_kept_and_multiplied_in_float32(version: str) -> None:
    config, tensors = make_weights(version, 2, 72, 24, dtype=torch.float16)
    native, idx = NativeModel(config, tensors), tokens(2, 30)
    with torch.no_grad():
        expected = assemble(config, tensors)(idx)[0]
    assert native.dtype == torch.float32 and set(native.formats) == {"float16 exact"}
    assert native.embedding.dtype == torch.float16
    assert_close_relative(native(idx)[0], expected, LOGITS_TOLERANCE)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("version", VERSIONS)
def test_quantized_matrices_equal_their_dequantized_weights(version: str, scheme: str) -> None:
    config, tensors = make_weights(version, 2, 72, 24)
    dense, quantized = quantize_tensors(tensors, scheme)
    weights = ModelWeights(dense, quantized)
    idx = tokens(2, 30)
    with torch.no_grad():
        expected, _ = assemble(config, weights)(idx)
    assert isinstance(assemble(config, weights), BaseModel)
    model = assemble(config, weights, pack=True)
    assert isinstance(model, NativeModel) and scheme in model.formats
    assert_close_relative(model(idx)[0], expected, 1e-3)


@every_instruction_set
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("version", ["4", "5.2", "6.0"])
def test_any_batch_and_any_split_give_the_same_bits(instruction_set: str, version: str, scheme: str | None) -> None:
    config, tensors = make_weights(version, 2, 72, 24, dtype=torch.bfloat16)
    dense, quantized = quantize_tensors(tensors, scheme) if scheme else (tensors, {})
    model, idx = NativeModel(config, dense, quantized), tokens(4, 40)
    with use_instruction_set(instruction_set):
        logits, state = model(idx)
        for cut in (0, 1, 13, 39, 40):
            first, middle = model(idx[:, :cut])
            second, after = model(idx[:, cut:], middle)
            assert torch.equal(torch.cat((first, second), 1), logits)
            assert all(torch.equal(after.tensors()[name], tensor) for name, tensor in state.tensors().items())
        for row in range(4):
            alone, alone_state = model(idx[row : row + 1])
            assert torch.equal(alone[0], logits[row])
            assert all(
                torch.equal(tensor, state.rows(row).tensors()[name]) for name, tensor in alone_state.tensors().items()
            )


def test_chunks_of_a_long_prompt_do_not_change_the_result() -> None:
    config, tensors = make_weights("6.0", 2, 72, 24)
    model, idx = NativeModel(config, tensors), tokens(2, 700)
    logits, state = model(idx)
    first, after = model(idx[1:, :699])
    last, last_state = model(idx[1:, 699:], after)
    assert torch.equal(torch.cat((first, last), 1)[0], logits[1])
    assert torch.equal(last_state.tensors()["wkv"], state.rows(1).tensors()["wkv"])
    assert torch.equal(model(idx, last=True)[0][:, 0], logits[:, -1])


@pytest.mark.parametrize("version", VERSIONS)
def test_ragged_and_empty_rows_equal_separate_calls(version: str) -> None:
    config, tensors = make_weights(version, 2, 40, 8)
    model, idx = NativeModel(config, tensors), tokens(4, 30)
    before = model(tokens(4, 5, seed=1))[1]
    before_copy = before.clone()
    lengths = torch.tensor([30, 0, 7, 1])
    logits, state = model(idx, before, lengths=lengths)
    assert logits.shape == (4, 30, VOCAB)
    for row, length in enumerate(lengths.tolist()):
        alone, alone_state = model(idx[row : row + 1, :length], before.rows(row))
        assert torch.equal(logits[row, :length], alone[0]) and not logits[row, length:].any()
        assert all(
            torch.equal(tensor, state.rows(row).tensors()[name]) for name, tensor in alone_state.tensors().items()
        )
    assert all(torch.equal(tensor, before_copy.tensors()[name]) for name, tensor in before.tensors().items())
    last, _ = model(idx, before, lengths=lengths.clamp_min(1), last=True)
    assert last.shape == (4, 1, VOCAB) and torch.equal(last[2, 0], logits[2, 6])


@pytest.mark.parametrize("version", ["4", "6.0"])
def test_no_tokens_and_empty_batches_are_valid(version: str) -> None:
    config, tensors = make_weights(version, 2, 40, 8)
    model = NativeModel(config, tensors)
    before = model(tokens(2, 5))[1]
    logits, state = model(tokens(2, 0), before)
    assert logits.shape == (2, 0, VOCAB)
    assert all(torch.equal(tensor, before.tensors()[name]) for name, tensor in state.tensors().items())
    logits, state = model(tokens(0, 3))
    assert logits.shape == (0, 3, VOCAB) and state.batch == 0
    logits, state = model(tokens(0, 3), lengths=torch.zeros(0, dtype=torch.long), last=True)
    assert logits.shape == (0, 1, VOCAB)


def test_invalid_arguments_are_rejected() -> None:
    config, tensors = make_weights("6.0", 2, 40, 8)
    model, idx = NativeModel(config, tensors), tokens(2, 4)
    for bad in (-1, VOCAB):
        with pytest.raises(TokenizerError, match=f"token id {bad} is outside"):
            model(torch.full((1, 3), bad))
    with pytest.raises(UsageError, match="needs \\(batch, time\\)"):
        model(idx[0])
    with pytest.raises(UsageError, match="needs int64"):
        model(idx.int())
    with pytest.raises(UsageError, match="at least one token"):
        model(idx[:, :0], last=True)
    for lengths in (torch.tensor([1]), torch.tensor([1, 5]), torch.tensor([-1, 2])):
        with pytest.raises(UsageError, match="lengths must hold 2 numbers between 0 and 4"):
            model(idx, lengths=lengths)
    with pytest.raises(StateError, match="has 1 sequences"):
        model(idx, model.initial_state(1))


def test_gradients_devices_and_copies_are_rejected() -> None:
    config, tensors = make_weights("6.0", 2, 40, 8)
    model, idx = NativeModel(config, tensors), tokens(2, 4)
    state = model.initial_state(2)
    tracked = type(state)(**{name: tensor.requires_grad_() for name, tensor in state.tensors().items()})
    with pytest.raises(UsageError, match="cannot compute gradients; load it with pack=False"):
        model(idx, tracked)
    with torch.no_grad():
        model(idx, tracked)
    with pytest.raises(StateError, match="on meta, the model on the CPU"):
        model(idx, state.to("meta"))
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError, match="cannot be copied"):
            attempt(model)


def test_a_conversion_of_buffers_does_not_change_the_model() -> None:
    config, tensors = make_weights("6.0", 2, 40, 8)
    model, idx = NativeModel(config, tensors), tokens(2, 4)
    before = model(idx)[0]
    model.double().half()
    assert torch.equal(model(idx)[0], before)


def test_the_initial_state_is_the_tuned_state() -> None:
    config, tensors = make_weights("6.0", 2, 40, 8, tuned_state=True)
    model, torch_model, idx = NativeModel(config, tensors), assemble(config, tensors), tokens(2, 9)
    assert torch.equal(model.initial_state(2).tensors()["wkv"], torch_model.initial_state(2).tensors()["wkv"])
    with torch.no_grad():
        assert_close_relative(model(idx)[0], torch_model(idx)[0], LOGITS_TOLERANCE)


def test_several_threads_can_use_one_model() -> None:
    config, tensors = make_weights("6.0", 2, 72, 24)
    model = NativeModel(config, tensors)
    prompts = [tokens(1, 40, seed=seed) for seed in range(6)]
    expected = [model(prompt)[0] for prompt in prompts]
    results: dict[int, Tensor] = {}

    def run(number: int) -> None:
        for _ in range(5):
            results[number] = model(prompts[number])[0]

    workers = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(results[number], expected[number]) for number in range(6))


def test_a_state_in_use_is_never_overwritten() -> None:
    """The memory of a large state is reused only after its last reference is gone."""
    config, tensors = make_weights("6.0", 2, 128, 64)
    model, idx = NativeModel(config, tensors), tokens(70, 2)
    states, copies = [], []
    state = None
    for _ in range(6):
        _, state = model(idx, state)
        states.append(state)
        copies.append(state.clone())
    for state_in_use, expected in zip(states, copies, strict=True):
        assert all(torch.equal(tensor, expected.tensors()[name]) for name, tensor in state_in_use.tensors().items())
    view = states[0].tensors()["wkv"][1, 3]
    view_copy = view.clone()
    del states, state_in_use, copies, expected
    for _ in range(6):
        _, state = model(idx, state)
    assert torch.equal(view, view_copy)


def test_free_blocks_are_limited_and_start_on_cache_lines() -> None:
    pool = BufferPool()
    for rows in range(300_000, 300_020):
        assert pool.empty((rows,)).data_ptr() % 64 == 0
    assert len(pool._free) == MAX_FREE_BLOCKS
    reused = pool.empty((300_019,))
    assert reused.data_ptr() % 64 == 0 and len(pool._free) == MAX_FREE_BLOCKS - 1


def test_weights_of_a_wrong_shape_are_rejected() -> None:
    config, tensors = make_weights("6.0", 2, 40, 8)
    wrong = {**tensors, "emb.weight": tensors["emb.weight"][:9], "head.weight": tensors["head.weight"][:9]}
    with pytest.raises(CheckpointError, match=r"wrong shape: emb\.weight"):
        assemble(config, wrong, pack=True)
    with pytest.raises(CheckpointError, match=r"emb\.weight is missing, or its size does not match"):
        NativeModel(config, {**tensors, "emb.weight": wrong["emb.weight"]})
    dense, quantized = quantize_tensors(tensors, "int8")
    with pytest.raises(UsageError, match="is already quantized"):
        assemble(config, ModelWeights(dense, quantized), pack=True, quant="int4")
