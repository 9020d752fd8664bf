"""Recipes that come with Fledge, one function each; a start for your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fledge.train.recipe import Recipe


def tiny() -> Recipe:
    """A Finch that a laptop trains in an hour or two."""
    return Recipe(n_layer=6, n_embd=192, peak=2e-3, final=1e-4, warmup=60, steps=1350)


def small() -> Recipe:
    """L6 D256: most of what 25 MB of int8 can hold beside a vocabulary of 16,384."""
    return Recipe(n_layer=6, n_embd=256, peak=1.5e-3, final=1e-4, warmup=100, steps=5000)


def minipile() -> Recipe:
    """The official demonstration: L12 D768 on MiniPile, in the order and with the rates of RWKV-LM (for a GPU)."""
    return Recipe(
        n_layer=12,
        n_embd=768,
        length=512,
        batch=16,
        micro=16,
        order="official",
        steps=180_000,
        peak=6e-4,
        final=6e-5,
        warmup=10,
        weight_decay=0.001,
    )


def long() -> Recipe:
    """Rows of 65,536 tokens, read by windows of 1024 with the gradient through two: memory as for 2048 tokens."""
    return Recipe(length=65_536, batch=1, micro=1, window=1024, through=2)


def against_spikes(recipe: Recipe) -> Recipe:
    """The published remedies for Finch's loss spikes: tiny eps, shorter memory of squares, slow warm-up, more decay."""
    return replace(
        recipe, eps=1e-18, beta2=0.95, warmup=max(recipe.warmup, 20), weight_decay=0.1, final=recipe.peak / 100
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "small": small,
    "minipile": minipile,
    "long": long,
    "careful": lambda: against_spikes(small()),
}
