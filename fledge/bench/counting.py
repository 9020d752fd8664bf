"""How much arithmetic a model asks for, from its config alone, so that speeds can be told as a share of a machine's.

Training takes, for each token of a text of T tokens, with 2 operations a multiply-add and twice as much backward as
forward:

    6 x numbers       of all matrices: the head too, the embedding not, of which a row is looked up
    18 L H N^2        the recurrence of an Eagle or Finch (6 L H N^2 forward: paper, appendix E)
    6 L A (T + 1)     a transformer's attention: a token meets (T + 1) / 2 others, once by its key and once by its value

What a program computes beyond that (chunks, recomputation) does not count: it is its own affair how it gets there.
"""

from __future__ import annotations

import math

from fledge.checkpoint import get_expected_shapes
from fledge.models import ModelConfig

FACTORS = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")
"""Matrices of RWKV-6 that are no `*.weight`."""


def matrix_numbers(config: ModelConfig) -> tuple[int, int]:
    """Numbers in all matrices that a token is multiplied with, and those of them in the head."""
    sizes = {
        name: math.prod(shape)
        for name, shape in get_expected_shapes(config).items()
        if name.endswith(FACTORS) or (name.endswith(".weight") and len(shape) == 2 and name != "emb.weight")
    }
    return sum(sizes.values()), sizes["head.weight"]


def training_operations(config: ModelConfig, length: int) -> int:
    """Operations a token of training on texts of `length` tokens, as counted above. RWKV-4's recurrence is left out."""
    products = 6 * matrix_numbers(config)[0]
    if config.version == "llama":
        return products + 6 * config.n_layer * config.dim_att * (length + 1)
    return products + 18 * config.n_layer * config.n_head * config.head_size**2
