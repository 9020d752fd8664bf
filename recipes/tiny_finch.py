"""The recipe of the bundled model: a small Finch with a pruned World vocabulary, trained from scratch on a CPU.

    fledge data build recipes/tiny_finch.toml --to store
    fledge train recipes/tiny_finch.py:tiny_finch --data store --to runs/tiny-finch
    fledge train recipes/tiny_finch.py:transformer --data store --to runs/tiny-transformer
    fledge convert runs/tiny-finch/model.safetensors fledge/assets/tiny-finch.safetensors --type bf16 --force

The transformer is for comparison: it has the same number of parameters, data, rows and learning rates.
"""

from __future__ import annotations

from dataclasses import replace

from fledge.train.recipe import Recipe


def tiny_finch() -> Recipe:
    """L6 D256."""
    return Recipe(
        n_layer=6,
        n_embd=256,
        length=512,
        batch=16,
        micro_batch_size=8,
        steps=4000,
        max_lr=2e-3,
        min_lr=1e-4,
        warmup_steps=100,
        beta2=0.95,
        save_every=50,
        validate_every=250,
    )


def transformer() -> Recipe:
    """A transformer with the architecture of Llama and the same size."""
    return replace(tiny_finch(), family="transformer")
