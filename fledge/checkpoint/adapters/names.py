"""Detect adapters and their kind from tensor names, and check that they are complete.

blocks.<i>.att.key.lora_A, .lora_B    factors of a matrix: a LoRA
blocks.<i>.att.time_state             the initial state; without other tensors, a tuned state
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from fledge.checkpoint.adapters.tuned_state import STATE
from fledge.checkpoint.formats.huggingface.names import PREFIX
from fledge.checkpoint.formats.safetensors import DTYPES
from fledge.checkpoint.shapes import Shape
from fledge.core.errors import CheckpointError, UnsupportedError
from fledge.models.adapters import TARGETS

FACTOR = re.compile(r"(blocks\.\d+\.(\w+\.\w+))\.(lora_[AB])")
PREFIXES = (PREFIX, "model.")  # of DeepSpeed, and of the module in which RWKV-PEFT wraps a model


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these names of a file are those of an adapter, including unsupported ones, and not of a whole model."""
    official = {_strip_prefix(name) for name in names}
    has_adapter = any(".lora_" in name or name.endswith(".disha") or STATE.fullmatch(name) for name in official)
    return has_adapter and "emb.weight" not in official


def strip_prefixes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the tensors under official names. Raises CheckpointError for a repeated name and for other dtypes."""
    stripped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        official = _strip_prefix(name)
        if official in stripped:
            raise CheckpointError(f"{source} holds {official!r:.80} twice, with and without a prefix")
        if tensor.dtype not in DTYPES.values():
            raise UnsupportedError(f"{source}: {name!r:.80} has dtype {tensor.dtype}; adapters hold floats")
        stripped[official] = tensor
    return stripped


def _strip_prefix(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def detect_kind(tensors: Mapping[str, Tensor], source: str) -> str:
    """Return "lora" or "state". Raises CheckpointError for anything else and for a factor without its counterpart."""
    if "emb.weight" in tensors and "head.weight" in tensors:
        raise CheckpointError(f"{source} is a whole model, not an adapter; give it as the model")
    if any(name.endswith(".disha") for name in tensors):
        raise UnsupportedError(f"{source} is a DiSHA adapter, which Fledge cannot apply; merge it with RWKV-PEFT")
    if tensors and all(STATE.fullmatch(name) for name in tensors):
        return "state"
    factors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    if not factors:
        raise CheckpointError(
            f"{source} is not an adapter: looked for blocks.0.att.key.lora_A or blocks.0.att.time_state, found "
            f"{min(tensors, default='no tensor')!r:.80}"
        )
    for name in factors:
        match = FACTOR.fullmatch(name)
        if match is None or match[2] not in TARGETS:
            raise CheckpointError(f"{source}: {name!r:.80} is not for a matrix that Fledge can adapt")
        _check_pair(match[1], factors, source)
    return "lora"


def _check_pair(name: str, factors: Mapping[str, Tensor], source: str) -> None:
    down, up = (factors.get(f"{name}.lora_{letter}") for letter in "AB")
    if down is None or up is None:
        raise CheckpointError(f"{source}: {name} has only one of its two factors lora_A and lora_B")
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        shapes: tuple[Shape, Shape] = (tuple(down.shape), tuple(up.shape))
        raise CheckpointError(f"{source}: {name} has factors of {shapes[0]} and {shapes[1]}, which do not match")
