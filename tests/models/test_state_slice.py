"""One call reads sequences of several batched states. Each gets the bits that it gets alone, and no state is copied."""

from __future__ import annotations

import pytest
import torch
from native_library import needs_native
from random_checkpoints import VERSIONS, random_checkpoint

from fledge.checkpoint import assemble, detect
from fledge.core.errors import StateError, TokenizerError
from fledge.models.native_model import NativeModel
from fledge.models.state import State
from fledge.models.state_slice import StateSlice, gather_states

VOCAB = 77
INPUTS = [[5], [7, 1, 2, 3, 76], [4, 4], [9] * 300]  # one token of decode and three prompts, one longer than a chunk


def make_model(version: str, pack: bool) -> torch.nn.Module:
    tensors = random_checkpoint(version, n_layer=3, n_embd=40, head_size=8, vocab_size=VOCAB, seed=3)
    return assemble(detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors, pack=pack)


def make_slices(model: torch.nn.Module) -> list[StateSlice]:
    """Sequences of two batched states, not only the first of each, and the only sequence of a third state."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        three, two, one = (model(torch.randint(VOCAB, (B, 6), generator=generator))[1] for B in (3, 2, 1))
    return [StateSlice(three, 2), StateSlice(two, 1), StateSlice(three, 0), StateSlice(one)]


def are_equal(one: State, other: State) -> bool:
    return all(torch.equal(x, other.tensors()[name]) for name, x in one.tensors().items())


@needs_native
@pytest.mark.parametrize("version", VERSIONS)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(version: str) -> None:
    model = make_model(version, pack=True)
    assert isinstance(model, NativeModel)
    slices = make_slices(model)
    copies = [part.extract().clone() for part in slices]
    logits, after = model.read(INPUTS, slices)
    assert logits.shape == (4, VOCAB) and after.batch == 4
    for index, (ids, part) in enumerate(zip(INPUTS, slices, strict=True)):
        alone, state = model(torch.tensor([ids]), part.extract(), last=True)
        assert torch.equal(logits[index], alone[0, 0])
        assert are_equal(after.rows(index), state)
    assert all(are_equal(part.extract(), copy) for part, copy in zip(slices, copies, strict=True))


@needs_native
def test_invalid_ids_and_states_of_other_models_are_rejected() -> None:
    model, rwkv4 = make_model("6.0", pack=True), make_model("4", pack=True)
    assert isinstance(model, NativeModel)
    with pytest.raises(TokenizerError, match="77 is outside"):
        model.read([[VOCAB]], [StateSlice(model.initial_state(1))])
    with pytest.raises(StateError, match="does not fit"):
        model.read([[1], [2]], [StateSlice(model.initial_state(1)), StateSlice(rwkv4.initial_state(1))])


def test_gathering_copies_nothing_if_the_sequences_are_one_batch() -> None:
    model = make_model("6.0", pack=False)
    slices = make_slices(model)
    three = slices[0].state
    assert gather_states([StateSlice(three, 0), StateSlice(three, 1), StateSlice(three, 2)]) is three
    assert are_equal(gather_states([StateSlice(three, 2), StateSlice(three, 0)]), three.rows([2, 0]))
    assert are_equal(gather_states(slices), State.stack([part.extract() for part in slices]))
    assert slices[3].extract() is slices[3].state


def test_an_extracted_sequence_does_not_keep_its_batch_in_memory() -> None:
    part = make_slices(make_model("6.0", pack=False))[0]
    for name, tensor in part.extract().tensors().items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, name
