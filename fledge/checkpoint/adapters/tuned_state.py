"""Tuned initial states: files with only `blocks.<i>.att.time_state`, and merging them into the tensors of a model.

State tuning trains only the initial state of a model. The axes stay (H, V, K), as every trainer writes them; the model
converts them to its own (H, K, V) when it creates its first state.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fledge.checkpoint.hub import locate
from fledge.checkpoint.reader import read_raw, rename_to_official
from fledge.core.errors import CheckpointError
from fledge.models.config import ModelConfig

STATE = re.compile(r"blocks\.\d+\.att\.time_state")


def load_tuned_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read `blocks.<i>.att.time_state` -> (H, V, K) from the file of a state tuner or from a whole model.

    path: as for `load`. Raises CheckpointError if it holds no tuned state.
    """
    raw = read_raw(locate(path))
    _, tensors = rename_to_official(raw.tensors, str(raw.path))
    states = {name: tensor for name, tensor in tensors.items() if STATE.fullmatch(name)}
    if not states:
        raise CheckpointError(
            f"{path} holds no tuned state: looked for blocks.0.att.time_state, found {min(tensors, default='')!r:.80}"
        )
    return states


def merge_tuned_state(
    config: ModelConfig, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str = "the tuned state"
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config and tensors of the same model with the initial state `state`.

    An existing initial state is replaced. Raises CheckpointError if the state is for other sizes.
    """
    if config.version in ("4", "llama"):
        model = "an RWKV-4 model" if config.version == "4" else "a transformer"
        raise CheckpointError(f"{source} cannot be used with {model}, which has no matrix state")
    shape = (config.n_head, config.head_size, config.head_size)
    names = [f"blocks.{layer}.att.time_state" for layer in range(config.n_layer)]
    if set(state) != set(names):
        raise CheckpointError(f"{source} is for {len(state)} layers, the model has {config.n_layer}")
    for name in names:
        if tuple(state[name].shape) != shape:
            raise CheckpointError(f"{source}: {name} is {tuple(state[name].shape)}, the model needs {shape}")
    return replace(config, tuned_state=True), {**tensors, **{name: state[name] for name in names}}
