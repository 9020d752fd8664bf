"""Sequences of several batched states in one call: the bits of reading each alone, with nothing copied on the way."""

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
PIECES = [[5], [7, 1, 2, 3, 76], [4, 4], [9] * 300]  # a written token beside prompts, one longer than a native chunk


def model_of(version: str, pack: bool) -> torch.nn.Module:
    tensors = random_checkpoint(version, n_layer=3, n_embd=40, head_size=8, vocab_size=VOCAB, seed=3)
    return assemble(detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors, pack=pack)


def some_states(model: torch.nn.Module) -> list[StateSlice]:
    """Rows out of two batched states and of one alone, none of them in its batch's first place only."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        three, two, one = (model(torch.randint(VOCAB, (B, 6), generator=generator))[1] for B in (3, 2, 1))
    return [StateSlice(three, 2), StateSlice(two, 1), StateSlice(three, 0), StateSlice(one)]


def equal(one: State, other: State) -> bool:
    return all(torch.equal(x, other.tensors()[name]) for name, x in one.tensors().items())


@needs_native
@pytest.mark.parametrize("version", VERSIONS)
def test_a_piece_beside_others_has_the_bits_of_one_alone(version: str) -> None:
    model = model_of(version, pack=True)
    assert isinstance(model, NativeModel)
    rows = some_states(model)
    kept = [row.extract().clone() for row in rows]
    logits, after = model.read(PIECES, rows)
    assert logits.shape == (4, VOCAB) and after.batch == 4
    for place, (piece, row) in enumerate(zip(PIECES, rows, strict=True)):
        alone, state = model(torch.tensor([piece]), row.extract(), last=True)
        assert torch.equal(logits[place], alone[0, 0])
        assert equal(after.rows(place), state)
    assert all(equal(row.extract(), before) for row, before in zip(rows, kept, strict=True))


@needs_native
def test_bad_ids_and_foreign_states_are_refused() -> None:
    model, other = model_of("6.0", pack=True), model_of("4", pack=True)
    assert isinstance(model, NativeModel)
    with pytest.raises(TokenizerError, match="77 is outside"):
        model.read([[VOCAB]], [StateSlice(model.initial_state(1))])
    with pytest.raises(StateError, match="does not fit"):
        model.read([[1], [2]], [StateSlice(model.initial_state(1)), StateSlice(other.initial_state(1))])


def test_gathering_copies_only_what_is_not_together_yet() -> None:
    model = model_of("6.0", pack=False)
    rows = some_states(model)
    three = rows[0].state
    assert gather_states([StateSlice(three, 0), StateSlice(three, 1), StateSlice(three, 2)]) is three
    assert equal(gather_states([StateSlice(three, 2), StateSlice(three, 0)]), three.rows([2, 0]))
    assert equal(gather_states(rows), State.stack([row.extract() for row in rows]))
    assert rows[3].extract() is rows[3].state


def test_a_row_alone_keeps_nothing_else_in_memory() -> None:
    row = some_states(model_of("6.0", pack=False))[0]
    for name, tensor in row.extract().tensors().items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, name
