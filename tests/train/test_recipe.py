"""Recipes: every built-in one is whole, changes are strict, files give their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fledge.core.errors import ConfigError, UsageError
from fledge.models import build
from fledge.train.recipe import Recipe, find_recipe
from fledge.train.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_built_in_recipe_makes_a_model_and_settings(name: str) -> None:
    recipe = find_recipe(name)
    model = build(recipe.model(300), device="meta")
    assert model.config.vocab_size == 300 and recipe.settings().schedule.steps == recipe.steps


def test_changes_are_read_by_the_type_of_the_setting() -> None:
    recipe = Recipe().changed(
        {"steps": "2_000", "peak": "3e-4", "borders": "true", "window": "none", "family": "eagle", "through": "3"}
    )
    assert (recipe.steps, recipe.peak, recipe.borders, recipe.window, recipe.through) == (2000, 3e-4, True, None, 3)
    assert recipe.model(50).version == "5.2" and Recipe().changed({"window": "64"}).window == 64
    assert Recipe(dtype="bfloat16").settings().compute_dtype == torch.bfloat16
    assert recipe.identity != Recipe().identity and "save_every" not in recipe.identity


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "5"}, "did you mean 'steps'"),
        ({"steps": "many"}, "steps is 'many'; it must be int"),
        ({"window": "x"}, "window is 'x'; it must be int or none"),
        ({"borders": "yes"}, "borders is 'yes'"),
        ({"family": "llama3"}, "choose from finch, eagle, rwkv4, transformer"),
        ({"micro": "5"}, "micro is 5; it must divide batch = 16"),
        ({"warmup": "1000"}, "warmup < steps"),
        ({"length": "0"}, "length is 0"),
    ],
)
def test_mistakes(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe().changed(changes)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from fledge.train.recipe import Recipe\ndef big():\n    return Recipe(n_layer=9)\ndef odd():\n    return 1\n"
    )
    assert find_recipe(f"{path}:big").n_layer == 9
    for wrong, words in (
        (f"{path}:none", "no function none"),
        (f"{path}:odd", "returns a Recipe"),
        ("big", "choose from"),
    ):
        with pytest.raises(UsageError, match=words):
            find_recipe(wrong)


def test_a_vocabulary_smaller_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 20, but the data has ids up to 49"):
        Recipe(vocab_size=20).model(50)
    assert Recipe(vocab_size=64).model(50).vocab_size == 64
