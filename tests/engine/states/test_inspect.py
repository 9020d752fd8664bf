"""Inspection of states: half-lives, norms, changes and distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from native_library import needs_native
from random_checkpoints import VERSIONS, random_checkpoint

from fledge.checkpoint import assemble, detect
from fledge.core.errors import StateError
from fledge.engine.generation import advance_state, make_initial_state
from fledge.engine.states.inspect import half_lives, head_norms, layer_distances, relative_changes
from fledge.models import ModelConfig, WkvState, zero_state


def model_of(version: str, pack: bool = False) -> torch.nn.Module:
    tensors = random_checkpoint(version, n_layer=3, n_embd=40, head_size=8, vocab_size=77, seed=3)
    return assemble(detect({name: tuple(tensor.shape) for name, tensor in tensors.items()}), tensors, pack=pack)


@needs_native
@pytest.mark.parametrize("version", VERSIONS)
def test_half_lives_of_torch_and_native_models_agree(version: str) -> None:
    table, native = half_lives(model_of(version)), half_lives(model_of(version, pack=True))
    assert table is not None and table.shape == (3, 1 if version == "4" else 5)
    assert native is not None and np.allclose(table, native, rtol=1e-6) and (table > 0).all()


def test_half_life_definition() -> None:
    model = model_of("5.2")
    table = half_lives(model)
    decay = torch.exp(-torch.exp(model.blocks[1].att.time_decay.detach().double()))  # (H, N)
    each = math.log(0.5) / torch.log(decay[2])
    assert table is not None and table[1, 2] == pytest.approx(float(each.median()), rel=1e-5)


@pytest.mark.parametrize("version", ["4", "6.0"])
def test_relative_changes_of_each_head(version: str) -> None:
    model = model_of(version)
    begin = make_initial_state(model)
    middle = advance_state(model, [5, 6, 7], begin)
    first, second = relative_changes(begin, middle), relative_changes(middle, advance_state(model, [8], middle))
    heads = 1 if version == "4" else 5
    assert first is not None and first.shape == (3, heads) and (first == 1).all(), "everything is new at first"
    assert second is not None and (second > 0).all()
    if version == "6.0":
        before, after = (
            advance_state(model, ids, make_initial_state(model)).tensors()["wkv"][1, 0, 2]
            for ids in ([5, 6, 7], [5, 6, 7, 8])
        )
        assert second[1, 2] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    held = head_norms(advance_state(model, [5, 6, 7], make_initial_state(model)))
    assert held is not None and held.shape == (3, heads) and (held > 0).all()


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_distance_is_zero_for_equal_states_and_one_for_an_empty_state(version: str) -> None:
    model = model_of(version)
    state, other = (advance_state(model, ids, make_initial_state(model)) for ids in ([5, 6, 7], [5, 6, 8]))
    same, apart, whole = (layer_distances(state, each) for each in (state, other, make_initial_state(model)))
    assert list(same) == ["att_shift", "memory", "ffn_shift"]
    assert all((table == 0).all() and table.shape == (3,) for table in same.values())
    assert all(0 < value < 2 for table in apart.values() for value in table)
    assert all(np.allclose(table, 1) for table in whole.values())


def test_states_of_different_models_cannot_be_compared() -> None:
    state = make_initial_state(model_of("5.2"))
    with pytest.raises(StateError, match="different sizes"):
        layer_distances(state, WkvState(state.att_shift[:2], state.wkv[:2], state.ffn_shift[:2]))
    llama = zero_state(ModelConfig.transformer(n_layer=1, n_embd=64, vocab_size=10), 1)
    with pytest.raises(StateError, match="the state of a transformer"):
        layer_distances(llama, llama)
