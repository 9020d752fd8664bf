"""The arithmetic of a model, computed from its config, so that speed can be reported as a share of a machine's limit.

Training operations per token of a text of T tokens. A multiply-add is 2 operations, and backward takes twice as many as
forward:

    6 x weights       of all matrices, including the head. The embedding is a lookup and does not count.
    18 L H N^2        the recurrence of an Eagle or Finch (6 L H N^2 forward: paper, appendix E)
    6 L A (T + 1)     attention of a transformer: (T + 1) / 2 keys and values per token on average

Additional work of an implementation (chunks, recomputation) does not count.
"""

from __future__ import annotations

import math

from fledge.checkpoint import get_expected_shapes
from fledge.models import ModelConfig

LORA_FACTORS = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")
"""Matrices of RWKV-6 whose names do not end in `.weight`."""


def count_matrix_weights(config: ModelConfig) -> tuple[int, int]:
    """Return the number of weights in all matrices that multiply a token, and in the head alone."""
    sizes = {
        name: math.prod(shape)
        for name, shape in get_expected_shapes(config).items()
        if name.endswith(LORA_FACTORS) or (name.endswith(".weight") and len(shape) == 2 and name != "emb.weight")
    }
    return sum(sizes.values()), sizes["head.weight"]


def training_operations(config: ModelConfig, length: int) -> int:
    """Return the training operations per token on texts of `length` tokens. RWKV-4's recurrence is not counted."""
    products = 6 * count_matrix_weights(config)[0]
    if config.version == "llama":
        return products + 6 * config.n_layer * config.dim_att * (length + 1)
    return products + 18 * config.n_layer * config.n_head * config.head_size**2
