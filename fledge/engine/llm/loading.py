"""From a name or a path to a ready `LLM`: finds the file, applies adapters, chooses device, dtype and tokenizer.

Adapters are merged into the weights where the native library will run them: it multiplies with packed matrices and
knows no LoRA, and merged weights cost nothing at run time. Everywhere else they stay apart (fledge.models.adapters), so
that `llm.adapted(...)` makes further models on the same weights. A tuned state is never merged: it is the state that
texts begin from.
Not here: reading checkpoints (fledge.checkpoint), which devices there are (fledge.core.device).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fledge import checkpoint
from fledge.core.device import choose_device, choose_dtype
from fledge.core.errors import CheckpointError, UnsupportedError
from fledge.core.files import get_asset_path
from fledge.engine.llm.adapters import Adapters, adapter_list, fingerprint, with_changes
from fledge.engine.llm.llm import LLM
from fledge.models.native_model import why_not_native
from fledge.tokenizer import Tokenizer, byte_vocabulary, load_world, tokenizer_for

BUNDLED = "tiny-finch"
"""The model that ships inside the package."""

NEOX_SIZE = 50277
"""Token rows of the models trained on the Pile, which use the GPT-NeoX tokenizer."""


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quant: str | None = None,
    pack: bool = True,
    adapter: Adapters = (),
) -> LLM:
    """The model of a checkpoint (file, folder or hub name), ready to generate; None or "tiny-finch" is the bundled one.

    device, dtype: names as in `fledge.core.device`; None chooses, and `llm.device_reason`, `llm.dtype_reason` say why.
    quant: "int8", "int4" or "mixed" quantises the matrices while loading, on a CPU; a file that `fledge quantize` wrote
    is quantised already.
    pack: use the CPU's best form, the native library or else reordered matrices; `llm.model` is then for inference
    only, without gradients and without matrices in its state_dict. No effect on other devices.
    adapter: a file, or several that work together: LoRAs add up, and at most one is a tuned state. To switch between
    adapters, load the base with pack=False and take `llm.adapted(...)` for each: all share its weights.
    Raises CheckpointError for a file that is missing or damaged, UnsupportedError for one that cannot be run,
    UsageError for an unknown device or dtype.
    """
    path = locate(name_or_path)
    adapters = adapter_list(adapter)
    chosen_device, device_reason = choose_device(device)
    found = checkpoint.read(path)  # once: between two readings the file could change, and a hub name asks the hub
    checkpoint.check_base(adapters, found)
    numbers = sum(tensor.numel() for tensor in found.tensors.values())
    numbers += sum(matrix.rows * matrix.columns for matrix in found.quantized.values())
    chosen_dtype, dtype_reason = choose_dtype(dtype, chosen_device, numbers)
    tokenizer = tokenizer_of(found.tokenizer_spec, found.config.vocab_size, str(path))
    name = found.path.stem if found.path.is_file() else Path(path).name
    changes, altered = checkpoint.combine_adapters(adapters), "" if quant is None else f"rounded to {quant}"
    if pack and chosen_device.type == "cpu" and why_not_native(found.config) is None:
        altered = fingerprint(changes, altered)
        found = checkpoint.merge_adapters(found, replace(changes, state={}), chosen_dtype)
        changes = replace(changes, factors={}, full_parameters={})
    stored = found.tensors["emb.weight"].dtype
    weights = checkpoint.ModelWeights(found.tensors, found.quantized, is_consumable=True)
    model = checkpoint.assemble(found.config, weights, device=chosen_device, dtype=chosen_dtype, pack=pack, quant=quant)
    if chosen_dtype is None and stored == torch.float16 and chosen_device.type == "cpu":
        dtype_reason = "the file's float16, computed in float32"
    llm = LLM(model, tokenizer, name, device_reason, dtype_reason, source=str(found.path), template=found.template)
    return with_changes(replace(llm, altered=altered), changes)


def locate(name_or_path: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """What fledge.checkpoint is to look for. Raises CheckpointError where the bundled model is meant and not there."""
    if name_or_path is not None and (os.fspath(name_or_path) != BUNDLED or os.path.exists(name_or_path)):
        return name_or_path
    path = get_asset_path(f"{BUNDLED}.safetensors")
    if not path.is_file():
        raise CheckpointError(
            f"the bundled model {path} is missing from this installation; install Fledge again, "
            "or give the path of a checkpoint"
        )
    return path


def tokenizer_of(spec: Mapping[str, Any] | None, vocab_size: int, source: str) -> Tokenizer:
    """The tokenizer of a checkpoint: the one it records, else the one that models with so many rows use."""
    if spec is not None:
        return tokenizer_for(spec)
    if vocab_size == 65536:
        return load_world()
    if vocab_size == 256:
        return tokenizer_for(byte_vocabulary())
    if vocab_size == NEOX_SIZE:
        raise UnsupportedError(
            f"{source} has {NEOX_SIZE} token rows: a Pile model, whose GPT-NeoX tokenizer Fledge does not ship. "
            "Its text cannot be read or written here; `fledge info` and `fledge convert` work"
        )
    raise UnsupportedError(
        f"{source} has {vocab_size} token rows and records no vocabulary; known sizes: 65536 (World) and 256 (bytes). "
        "A .safetensors that Fledge wrote keeps a pruned vocabulary; a .pth cannot"
    )
