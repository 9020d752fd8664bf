"""Loading a model: from a name or a path to a ready `LLM`.

If the native library will run the model, adapters are merged into the weights: the library multiplies with packed
matrices and does not support LoRA, and merged weights cost nothing at run time. Otherwise adapters stay separate
(fledge.models.adapters), so that `llm.with_adapter(...)` can make further models on the same weights. A tuned state is
never merged: it becomes the initial state of each text.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from fledge import checkpoint
from fledge.core.device import choose_device, choose_dtype
from fledge.core.errors import CheckpointError
from fledge.core.files import get_asset_path
from fledge.engine.llm.adapters import AdapterSources, hash_changes, read_adapters
from fledge.engine.llm.llm import LLM
from fledge.models.native_model import why_not_native

BUNDLED = "tiny-finch"
"""The model that is part of the package."""


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quant: str | None = None,
    pack: bool = True,
    adapter: AdapterSources = (),
) -> LLM:
    """The model of a checkpoint (file, folder or hub name), ready to generate; None or "tiny-finch" is the bundled one.

    device, dtype: names as in `fledge.core.device`; None chooses, and `llm.device_reason`, `llm.dtype_reason` give the
    reason.
    quant: "int8", "int4" or "mixed" quantizes the matrices while loading, on a CPU. A file written by `fledge quantize`
    is already quantized.
    pack: use the fastest form for the CPU, the native library or else reordered matrices; `llm.model` is then for
    inference only, without gradients and without matrices in its state_dict. No effect on other devices.
    adapter: a file, or several that are used together: LoRAs add up, and at most one is a tuned state. To switch
    between adapters, load the base with pack=False and use `llm.with_adapter(...)` for each: all share its weights.
    Raises CheckpointError if the file is missing or damaged, UnsupportedError if it cannot be run, UsageError for an
    unknown device or dtype.
    """
    path = locate_checkpoint(name_or_path)
    adapters = read_adapters(adapter)
    chosen_device, device_reason = choose_device(device)
    source = checkpoint.read(path)  # only once: the file could change between two reads, and a hub name asks the hub
    checkpoint.check_base(adapters, source)
    parameters = sum(tensor.numel() for tensor in source.tensors.values())
    parameters += sum(matrix.rows * matrix.columns for matrix in source.quantized.values())
    chosen_dtype, dtype_reason = choose_dtype(dtype, chosen_device, parameters)
    tokenizer = checkpoint.load_tokenizer(source.tokenizer_spec, source.config.vocab_size, str(path))
    name = source.path.stem if source.path.is_file() else Path(path).name
    changes, weight_changes = checkpoint.combine_adapters(adapters), "" if quant is None else f"rounded to {quant}"
    if pack and chosen_device.type == "cpu" and why_not_native(source.config) is None:
        weight_changes = hash_changes(changes, weight_changes)
        source = checkpoint.merge_adapters(source, replace(changes, state={}), chosen_dtype)
        changes = replace(changes, factors={}, full_parameters={})
    stored_dtype = source.tensors["emb.weight"].dtype
    weights = checkpoint.ModelWeights(source.tensors, source.quantized, is_consumable=True)
    model = checkpoint.assemble(
        source.config, weights, device=chosen_device, dtype=chosen_dtype, pack=pack, quant=quant
    )
    if chosen_dtype is None and stored_dtype == torch.float16 and chosen_device.type == "cpu":
        dtype_reason = "the file's float16, computed in float32"
    llm = LLM(model, tokenizer, name, device_reason, dtype_reason, source=str(source.path), template=source.template)
    return replace(llm, weight_changes=weight_changes).with_changes(changes)


def locate_checkpoint(name_or_path: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """The argument for `fledge.checkpoint.read`: the bundled model's file, or the argument itself.

    Raises CheckpointError if the bundled model is requested but missing.
    """
    if name_or_path is not None and (os.fspath(name_or_path) != BUNDLED or os.path.exists(name_or_path)):
        return name_or_path
    path = get_asset_path(f"{BUNDLED}.safetensors")
    if not path.is_file():
        raise CheckpointError(
            f"the bundled model {path} is missing from this installation; install Fledge again, "
            "or give the path of a checkpoint"
        )
    return path
