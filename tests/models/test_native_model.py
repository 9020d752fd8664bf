"""The native model against its torch twin: every version, every instruction set, and the seam's promises to the bit."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from closeness import assert_close_relative, relative_error
from native_library import every_instruction_set, forced, needs_native
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
# Widths that vectors and panels divide and do not; heads of 8, 24, 64; 2560 has 40 heads, as no power of two.
SIZES = [(3, 40, 8), (2, 128, 64), (2, 72, 24)]


# Relative to the largest value. Rounding is bounded by 2 * layers * terms * 2**-24 on each side (see closeness.py),
# 4.6e-5 for the smallest case here (3 layers, sums of 128 terms). The largest differences measured are 1.2e-5 and
# 2.5e-6.
LOGITS, STATES = 3e-5, 1e-5


def weights_of(
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
def test_scaled_keys_equal_the_twin(instruction_set: str) -> None:
    config, tensors = weights_of("6.0", 2, 72, 24)
    scaled, idx = replace(config, scaled_keys=True), tokens(3, 20)
    with torch.no_grad(), forced(instruction_set):
        logits, state = NativeModel(scaled, tensors)(idx)
        expected, expected_state = assemble(scaled, tensors)(idx)
        plain, _ = NativeModel(config, tensors)(idx)
    assert_close_relative(logits, expected, LOGITS, "logits")
    assert relative_error(plain, expected) > 100 * LOGITS
    for name, tensor in state.tensors().items():
        assert_close_relative(tensor, expected_state.tensors()[name], STATES, name)


@every_instruction_set
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_and_states_equal_the_twin(instruction_set: str, version: str, sizes: tuple[int, int, int]) -> None:
    config, tensors = weights_of(version, *sizes)
    twin, idx = assemble(config, tensors), tokens(3, 50)
    with torch.no_grad(), forced(instruction_set):
        logits, state = NativeModel(config, tensors)(idx)
        expected, expected_state = twin(idx)
    assert_close_relative(logits, expected, LOGITS)
    for name, tensor in state.tensors().items():
        assert_close_relative(tensor, expected_state.tensors()[name], STATES, name)


@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_a_width_of_2560_with_40_heads(version: str) -> None:
    config, tensors = weights_of(version, 1, 2560, 64, dim_ffn=200)
    idx = tokens(2, 5)
    with torch.no_grad():
        expected, _ = assemble(config, tensors)(idx)
    assert_close_relative(NativeModel(config, tensors)(idx)[0], expected, LOGITS)


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16_matrices_round_as_torch_does(version: str) -> None:
    config, tensors = weights_of(version, 2, 72, 24, dtype=torch.bfloat16)
    idx = tokens(2, 30)
    with torch.no_grad():
        rounded, exact = assemble(config, tensors)(idx)[0], assemble(config, tensors, dtype=torch.float32)(idx)[0]
    native = NativeModel(config, tensors)
    assert native.dtype == torch.bfloat16 and "bfloat16" in native.formats
    assert_close_relative(native(idx)[0], rounded, 2e-2)
    # float32 arithmetic on weights that stay bfloat16 in memory: as exact as float32 weights
    native = NativeModel(config, tensors, matrix_dtype=torch.float32)
    assert native.dtype == torch.float32 and set(native.formats) == {"bfloat16 exact"}
    assert_close_relative(native(idx)[0], exact, LOGITS)


@pytest.mark.parametrize("version", VERSIONS)
def test_float16_weights_stay_so_and_are_multiplied_in_float32(version: str) -> None:
    config, tensors = weights_of(version, 2, 72, 24, dtype=torch.float16)
    native, idx = NativeModel(config, tensors), tokens(2, 30)
    with torch.no_grad():
        expected = assemble(config, tensors)(idx)[0]
    assert native.dtype == torch.float32 and set(native.formats) == {"float16 exact"}
    assert native.embedding.dtype == torch.float16
    assert_close_relative(native(idx)[0], expected, LOGITS)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("version", VERSIONS)
def test_quantised_matrices_equal_their_expanded_twin(version: str, scheme: str) -> None:
    config, tensors = weights_of(version, 2, 72, 24)
    rest, quantized = quantize_tensors(tensors, scheme)
    given = ModelWeights(rest, quantized)
    idx = tokens(2, 30)
    with torch.no_grad():
        expected, _ = assemble(config, given)(idx)
    assert isinstance(assemble(config, given), BaseModel)
    model = assemble(config, given, pack=True)
    assert isinstance(model, NativeModel) and scheme in model.formats
    assert_close_relative(model(idx)[0], expected, 1e-3)


@every_instruction_set
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("version", ["4", "5.2", "6.0"])
def test_the_same_bits_in_any_batch_and_any_cut(instruction_set: str, version: str, scheme: str | None) -> None:
    config, tensors = weights_of(version, 2, 72, 24, dtype=torch.bfloat16)
    rest, quantized = quantize_tensors(tensors, scheme) if scheme else (tensors, {})
    model, idx = NativeModel(config, rest, quantized), tokens(4, 40)
    with forced(instruction_set):
        logits, state = model(idx)
        for cut in (0, 1, 13, 39, 40):
            first, middle = model(idx[:, :cut])
            second, end = model(idx[:, cut:], middle)
            assert torch.equal(torch.cat((first, second), 1), logits)
            assert all(torch.equal(end.tensors()[name], x) for name, x in state.tensors().items())
        for row in range(4):
            alone, own = model(idx[row : row + 1])
            assert torch.equal(alone[0], logits[row])
            assert all(torch.equal(x, state.rows(row).tensors()[name]) for name, x in own.tensors().items())


def test_long_prompts_are_read_in_pieces_that_leave_no_trace() -> None:
    config, tensors = weights_of("6.0", 2, 72, 24)
    model, idx = NativeModel(config, tensors), tokens(2, 700)
    logits, state = model(idx)
    one, after = model(idx[1:, :699])
    last, end = model(idx[1:, 699:], after)
    assert torch.equal(torch.cat((one, last), 1)[0], logits[1])
    assert torch.equal(end.tensors()["wkv"], state.rows(1).tensors()["wkv"])
    assert torch.equal(model(idx, last=True)[0][:, 0], logits[:, -1])


@pytest.mark.parametrize("version", VERSIONS)
def test_ragged_rows_and_empty_ones(version: str) -> None:
    config, tensors = weights_of(version, 2, 40, 8)
    model, idx = NativeModel(config, tensors), tokens(4, 30)
    begun = model(tokens(4, 5, seed=1))[1]
    kept = begun.clone()
    lengths = torch.tensor([30, 0, 7, 1])
    logits, state = model(idx, begun, lengths=lengths)
    assert logits.shape == (4, 30, VOCAB)
    for row, length in enumerate(lengths.tolist()):
        alone, own = model(idx[row : row + 1, :length], begun.rows(row))
        assert torch.equal(logits[row, :length], alone[0]) and not logits[row, length:].any()
        assert all(torch.equal(x, state.rows(row).tensors()[name]) for name, x in own.tensors().items())
    assert all(torch.equal(x, kept.tensors()[name]) for name, x in begun.tensors().items())
    last, _ = model(idx, begun, lengths=lengths.clamp_min(1), last=True)
    assert last.shape == (4, 1, VOCAB) and torch.equal(last[2, 0], logits[2, 6])


@pytest.mark.parametrize("version", ["4", "6.0"])
def test_nothing_to_read(version: str) -> None:
    config, tensors = weights_of(version, 2, 40, 8)
    model = NativeModel(config, tensors)
    begun = model(tokens(2, 5))[1]
    logits, state = model(tokens(2, 0), begun)
    assert logits.shape == (2, 0, VOCAB)
    assert all(torch.equal(x, begun.tensors()[name]) for name, x in state.tensors().items())
    logits, state = model(tokens(0, 3))
    assert logits.shape == (0, 3, VOCAB) and state.batch == 0
    logits, state = model(tokens(0, 3), lengths=torch.zeros(0, dtype=torch.long), last=True)
    assert logits.shape == (0, 1, VOCAB)


def test_mistakes_are_named() -> None:
    config, tensors = weights_of("6.0", 2, 40, 8)
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


def test_what_only_a_torch_model_can_do_is_refused() -> None:
    config, tensors = weights_of("6.0", 2, 40, 8)
    model, idx = NativeModel(config, tensors), tokens(2, 4)
    state = model.initial_state(2)
    tracked = type(state)(**{name: tensor.requires_grad_() for name, tensor in state.tensors().items()})
    with pytest.raises(UsageError, match="gives no gradients; load it with pack=False"):
        model(idx, tracked)
    with torch.no_grad():
        model(idx, tracked)
    with pytest.raises(StateError, match="on meta, the model on the CPU"):
        model(idx, state.to("meta"))
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError, match="cannot be copied"):
            attempt(model)


def test_moving_its_buffers_leaves_the_model_whole() -> None:
    config, tensors = weights_of("6.0", 2, 40, 8)
    model, idx = NativeModel(config, tensors), tokens(2, 4)
    before = model(idx)[0]
    model.double().half()
    assert torch.equal(model(idx)[0], before)


def test_a_tuned_state_is_where_it_begins() -> None:
    config, tensors = weights_of("6.0", 2, 40, 8, tuned_state=True)
    model, twin, idx = NativeModel(config, tensors), assemble(config, tensors), tokens(2, 9)
    assert torch.equal(model.initial_state(2).tensors()["wkv"], twin.initial_state(2).tensors()["wkv"])
    with torch.no_grad():
        assert_close_relative(model(idx)[0], twin(idx)[0], LOGITS)


def test_threads_of_the_caller_share_a_model() -> None:
    config, tensors = weights_of("6.0", 2, 72, 24)
    model = NativeModel(config, tensors)
    prompts = [tokens(1, 40, seed=seed) for seed in range(6)]
    expected = [model(prompt)[0] for prompt in prompts]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        for _ in range(5):
            found[number] = model(prompts[number])[0]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(6))


def test_a_state_is_never_written_again() -> None:
    """The memory of large states is recycled, but only once nobody holds them."""
    config, tensors = weights_of("6.0", 2, 128, 64)
    model, idx = NativeModel(config, tensors), tokens(70, 2)
    held, copies = [], []
    state = None
    for _ in range(6):
        _, state = model(idx, state)
        held.append(state)
        copies.append(state.clone())
    for have, want in zip(held, copies, strict=True):
        assert all(torch.equal(x, want.tensors()[name]) for name, x in have.tensors().items())
    part = held[0].tensors()["wkv"][1, 3]
    kept = part.clone()
    del held, have, copies, want
    for _ in range(6):
        _, state = model(idx, state)
    assert torch.equal(part, kept)


def test_unused_memory_is_bounded_and_lies_on_cache_lines() -> None:
    memory = BufferPool()
    for rows in range(300_000, 300_020):
        assert memory.empty((rows,)).data_ptr() % 64 == 0
    assert len(memory._free) == MAX_FREE_BLOCKS
    again = memory.empty((300_019,))
    assert again.data_ptr() % 64 == 0 and len(memory._free) == MAX_FREE_BLOCKS - 1


def test_weights_that_do_not_fit_the_config_are_refused() -> None:
    config, tensors = weights_of("6.0", 2, 40, 8)
    wrong = {**tensors, "emb.weight": tensors["emb.weight"][:9], "head.weight": tensors["head.weight"][:9]}
    with pytest.raises(CheckpointError, match=r"wrong shape: emb\.weight"):
        assemble(config, wrong, pack=True)
    with pytest.raises(CheckpointError, match=r"emb\.weight is missing, or its size does not match"):
        NativeModel(config, {**tensors, "emb.weight": wrong["emb.weight"]})
    rest, quantized = quantize_tensors(tensors, "int8")
    with pytest.raises(UsageError, match="is already quantized"):
        assemble(config, ModelWeights(rest, quantized), pack=True, quant="int4")
