"""What the names of an adapter's tensors say: whether a file is one, of which kind, and whether it is whole.

    blocks.<i>.att.key.lora_A, .lora_B    factors of a matrix: a LoRA
    blocks.<i>.att.time_state             the state that texts begin from; alone, a tuned state

Names, shapes and dtypes only. Not here: files, and what is done with an adapter (adapters.py).
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
PREFIXES = (PREFIX, "model.")  # of DeepSpeed, and of the module that RWKV-PEFT wraps around a model


def is_adapter(names: Iterable[str]) -> bool:
    """Whether names as a file has them are an adapter's, even one that Fledge cannot apply; not a whole model's."""
    plain = {_plain(name) for name in names}
    telling = any(".lora_" in name or name.endswith(".disha") or STATE.fullmatch(name) for name in plain)
    return telling and "emb.weight" not in plain


def strip_prefixes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors under official names. Raises CheckpointError where two have the same, or one is no float."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short_name = _plain(name)
        if short_name in plain:
            raise CheckpointError(f"{source} holds {short_name!r:.80} twice, with and without a prefix")
        if tensor.dtype not in DTYPES.values():
            raise UnsupportedError(f"{source}: {name!r:.80} has dtype {tensor.dtype}; adapters hold floats")
        plain[short_name] = tensor
    return plain


def _plain(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def detect_kind(tensors: Mapping[str, Tensor], source: str) -> str:
    """ "lora" or "state"; raises for everything else, and for a factor without its partner."""
    if "emb.weight" in tensors and "head.weight" in tensors:
        raise CheckpointError(f"{source} is a whole model, not an adapter; it goes where a model is asked for")
    if any(name.endswith(".disha") for name in tensors):
        raise UnsupportedError(f"{source} is a DiSHA adapter, which Fledge cannot apply; merge it with RWKV-PEFT")
    if tensors and all(STATE.fullmatch(name) for name in tensors):
        return "state"
    factors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    if not factors:
        raise CheckpointError(
            f"{source} is no adapter: looked for blocks.0.att.key.lora_A or blocks.0.att.time_state, found "
            f"{min(tensors, default='no tensor')!r:.80}"
        )
    for name in factors:
        match = FACTOR.fullmatch(name)
        if match is None or match[2] not in TARGETS:
            raise CheckpointError(f"{source}: {name!r:.80} belongs to no matrix that Fledge can adapt")
        _check_pair(match[1], factors, source)
    return "lora"


def _check_pair(name: str, factors: Mapping[str, Tensor], source: str) -> None:
    down, up = (factors.get(f"{name}.lora_{letter}") for letter in "AB")
    if down is None or up is None:
        raise CheckpointError(f"{source}: {name} has only one of its two factors lora_A and lora_B")
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        shapes: tuple[Shape, Shape] = (tuple(down.shape), tuple(up.shape))
        raise CheckpointError(f"{source}: {name} has factors of {shapes[0]} and {shapes[1]}, which do not go together")
