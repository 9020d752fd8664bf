"""Recipes: every built-in one is whole, changes are strict, files give their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fledge.core.errors import ConfigError, UsageError
from fledge.models import build
from fledge.train.builtin_recipes import RECIPES, find_recipe
from fledge.train.recipe import Recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_built_in_recipe_makes_a_model_and_settings(name: str) -> None:
    recipe = find_recipe(name)
    model = build(recipe.model(300), device="meta")
    assert model.config.vocab_size == 300 and recipe.settings().schedule.steps == recipe.steps


def test_changes_are_read_by_the_type_of_the_setting() -> None:
    recipe = Recipe().changed(
        {
            "steps": "2_000",
            "max_lr": "3e-4",
            "reset_at_document": "true",
            "window": "none",
            "family": "eagle",
            "tbptt_windows": "3",
        }
    )
    assert (recipe.steps, recipe.max_lr, recipe.reset_at_document, recipe.window, recipe.tbptt_windows) == (
        2000,
        3e-4,
        True,
        None,
        3,
    )
    assert recipe.model(50).version == "5.2" and Recipe().changed({"window": "64"}).window == 64
    assert Recipe(dtype="bfloat16").settings().compute_dtype == torch.bfloat16
    assert recipe.identity != Recipe().identity and "save_every" not in recipe.identity


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "5"}, "did you mean 'steps'"),
        ({"steps": "many"}, "steps is 'many'; it must be int"),
        ({"window": "x"}, "window is 'x'; it must be int or none"),
        ({"reset_at_document": "yes"}, "reset_at_document is 'yes'"),
        ({"family": "llama3"}, "choose from finch, eagle, rwkv4, transformer"),
        ({"micro_batch_size": "5"}, "micro_batch_size is 5; it must divide batch = 16"),
        ({"warmup_steps": "1000"}, "warmup_steps < steps"),
        ({"length": "0"}, "length is 0"),
        ({"seed": "99999999999999999999"}, "seed is 99999999999999999999; it must be from 0 to"),
        ({"seed": "-1"}, "seed is -1; it must be from 0 to"),
        ({"vocab_size": "1000000000"}, "vocab_size is 1000000000; it must be from 0 to 1048576"),
        ({"n_embd": "100000000"}, "n_embd is 100000000; it must be from 1 to 65536"),
        ({"max_lr": "inf"}, "learning rate would fall from inf to 0.0001; it needs 0 < min_lr <= max_lr <= 10"),
        ({"eps": "0"}, "eps is 0; it must be at least 1e-30"),
    ],
)
def test_mistakes(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe().changed(changes)


def test_recipe_from_a_file_is_used(tmp_path: Path) -> None:
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


FAILING = """
from fledge.train.recipe import Recipe
def late():
    return helper()
def unknown():
    return Recipe(n_layr=3)
def rate():
    return Recipe(
        max_lr=3e9)
def out():
    raise SystemExit("no")
def helper():
    return 1 / 0
"""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("late", r"mine\.py, line 13: the recipe failed: ZeroDivisionError: division by zero"),
        ("unknown", r"mine\.py, line 6: the recipe failed: TypeError: .*'n_layr'"),
        ("rate", r"mine\.py, line \d: the recipe failed: the learning rate would fall from 3e\+09"),
        ("out", r"mine\.py, line 11: the recipe failed: SystemExit: no"),
    ],
)
def test_an_error_of_a_recipe_names_its_line(tmp_path: Path, function: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(FAILING)
    with pytest.raises(UsageError, match=words):
        find_recipe(f"{tmp_path / 'mine.py'}:{function}")
    (tmp_path / "mine.py").write_text("x = 1\ndef late(:\n")
    with pytest.raises(UsageError, match=r"mine\.py, line 2: the recipe failed: SyntaxError"):
        find_recipe(f"{tmp_path / 'mine.py'}:{function}")


def test_vocabulary_smaller_than_the_data_is_rejected() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 20, but the data has ids up to 49"):
        Recipe(vocab_size=20).model(50)
    assert Recipe(vocab_size=64).model(50).vocab_size == 64
