"""The built-in recipes, one function each, and the lookup of a recipe by name."""

from __future__ import annotations

import runpy
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fledge.core.errors import FledgeError, UsageError
from fledge.train.recipe import Recipe


def tiny() -> Recipe:
    """A Finch that a laptop trains in one or two hours."""
    return Recipe(n_layer=6, n_embd=192, max_lr=2e-3, min_lr=1e-4, warmup_steps=60, steps=1350)


def small() -> Recipe:
    """L6 D256, which with a vocabulary of 16,384 nearly fills a file of 25 MB in int8."""
    return Recipe(n_layer=6, n_embd=256, max_lr=1.5e-3, min_lr=1e-4, warmup_steps=100, steps=5000)


def minipile() -> Recipe:
    """The demonstration of RWKV-LM: L12 D768 on MiniPile, with its order of rows and its learning rates. For a GPU."""
    return Recipe(
        n_layer=12,
        n_embd=768,
        length=512,
        batch=16,
        micro_batch_size=16,
        order="official",
        steps=180_000,
        max_lr=6e-4,
        min_lr=6e-5,
        warmup_steps=10,
        weight_decay=0.001,
    )


def long() -> Recipe:
    """Rows of 65,536 tokens in windows of 1024. The gradient flows through two windows: memory as for 2048 tokens."""
    return Recipe(length=65_536, batch=1, micro_batch_size=1, window=1024, tbptt_windows=2)


def prevent_spikes(recipe: Recipe) -> Recipe:
    """Apply the published remedies for loss spikes of Finch: a tiny eps, a smaller beta2, a warm-up, weight decay, and
    a final learning rate of a hundredth."""
    return replace(
        recipe,
        eps=1e-18,
        beta2=0.95,
        warmup_steps=max(recipe.warmup_steps, 20),
        weight_decay=0.1,
        min_lr=recipe.max_lr / 100,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "small": small,
    "minipile": minipile,
    "long": long,
    "careful": lambda: prevent_spikes(small()),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, or of `file.py:function`, which is executed. Raises UsageError if there is none."""
    if name in RECIPES:
        return RECIPES[name]()
    file, colon, function = name.rpartition(":")
    if not colon or not Path(file).is_file():
        raise UsageError(f"there is no recipe {name!r}; choose from {', '.join(RECIPES)}, or give file.py:function")
    try:
        make_recipe = runpy.run_path(file).get(function)
        recipe = make_recipe() if callable(make_recipe) else None
    except (Exception, SystemExit) as error:
        raise _describe_failure(file, error) from error
    if not isinstance(recipe, Recipe):
        raise UsageError(f"{file} has no function {function} that returns a Recipe")
    return recipe


def _describe_failure(file: str, error: BaseException) -> UsageError:
    """The error of a recipe file with its line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    where = f"{file}, line {lines[-1]}" if lines else file
    what = str(error) if isinstance(error, FledgeError) else f"{type(error).__name__}: {error}"
    return UsageError(f"{where}: the recipe failed: {what}")
