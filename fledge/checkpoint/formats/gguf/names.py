"""Convert tensor names and shapes of a Finch between GGUF (the architecture `rwkv6` of llama.cpp) and official files.

    official                       GGUF                                        change
    att.time_maa_{w,k,v,r,g}       time_mix_lerp_fused                         stacked (5, 1, 1, C), in this order
    att.time_maa_x, att.time_decay time_mix_lerp_x, time_mix_decay             (1, 1, C) -> (C)
    ffn.time_maa_{k,r}             channel_mix_lerp_{k,r}                      (1, 1, C) -> (C)
    att.time_maa_w1                time_mix_w1                                 transposed: (5 Dm, C)
    att.time_maa_w2                time_mix_w2                                 last axes swapped: (5, C, Dm)
    att.time_decay_{w1,w2}         time_mix_decay_{w1,w2}                      transposed: (Dd, C), (A, Dd)
    the rest                       see the tables                              none

Older files have five separate mixes. The converter of llama.cpp divides att.output and ffn.value of layer i by
2 ** (i // rescale_every_n_layers), and llama.cpp halves the residual stream after that many layers, in case it computes
in float16; `get_rescale_factor` reverts the division. ggml drops slow axes of length 1, so shapes are restored from the
fast end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fledge.core.errors import CheckpointError

LETTERS = "wkvrg"
OUTSIDE = {
    "token_embd.weight": "emb.weight",
    "token_embd_norm.weight": "blocks.0.ln0.weight",
    "token_embd_norm.bias": "blocks.0.ln0.bias",
    "output_norm.weight": "ln_out.weight",
    "output_norm.bias": "ln_out.bias",
    "output.weight": "head.weight",
}
# Inside a block, by conversion.
MATRICES = {
    **{f"time_mix_{name}.weight": f"att.{name}.weight" for name in ("receptance", "key", "value", "gate", "output")},
    **{f"channel_mix_{name}.weight": f"ffn.{name}.weight" for name in ("key", "receptance", "value")},
}
NORMS = {
    f"{gguf_name}.{part}": f"{target}.{part}"
    for gguf_name, target in (("attn_norm", "ln1"), ("attn_norm_2", "ln2"), ("time_mix_ln", "att.ln_x"))
    for part in ("weight", "bias")
}
VECTORS = {
    "time_mix_lerp_x.weight": "att.time_maa_x",
    "time_mix_decay.weight": "att.time_decay",
    "channel_mix_lerp_k.weight": "ffn.time_maa_k",
    "channel_mix_lerp_r.weight": "ffn.time_maa_r",
}
SEPARATE = {f"time_mix_lerp_{letter}.weight": f"att.time_maa_{letter}" for letter in LETTERS}
TRANSPOSED = {
    "time_mix_w1.weight": "att.time_maa_w1",
    "time_mix_decay_w1.weight": "att.time_decay_w1",
    "time_mix_decay_w2.weight": "att.time_decay_w2",
}
SWAPPED = {"time_mix_w2.weight": "att.time_maa_w2"}
HEADS = {"time_mix_first.weight": "att.time_faaaa"}
FUSED = "time_mix_lerp_fused.weight"
RESCALED = ("att.output.weight", "ffn.value.weight")
MAX_EXPONENT = 100  # of the power of two of a rescaling; Finch 14B has 10
BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
OFFICIAL_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

Parts = dict[str, Tensor]


class OutputTensor(NamedTuple):
    """One tensor of a GGUF file that is written."""

    name: str
    sources: tuple[str, ...]  # official names; five of them for the stacked mixes


def to_official_name(name: str) -> str:
    """Return the official name of a norm or a matrix; any other name is returned unchanged."""
    match = BLOCK.fullmatch(name)
    if match is None:
        return OUTSIDE.get(name, name)
    target = NORMS.get(match[2]) or MATRICES.get(match[2])
    return f"blocks.{match[1]}.{target}" if target else name


def is_matrix(official: str) -> bool:
    """Whether this is a matrix that may be quantized."""
    match = OFFICIAL_BLOCK.fullmatch(official)
    return official in ("emb.weight", "head.weight") or (match is not None and match[2] in MATRICES.values())


def get_rescale_factor(official: str, every: int, source: str) -> float:
    """Return the factor by which a tensor was divided in a file with rescale_every_n_layers `every`."""
    match = OFFICIAL_BLOCK.fullmatch(official)
    if not every or match is None or match[2] not in RESCALED:
        return 1.0
    exponent = int(match[1]) // every
    if exponent > MAX_EXPONENT:
        raise CheckpointError(f"{source}: rescale_every_n_layers {every} is not plausible; the file is damaged")
    return 2.0**exponent


def from_gguf(name: str, tensor: Tensor, head_size: int) -> Parts:
    """Convert one tensor to official names and shapes. Raises CheckpointError for an impossible shape."""
    match = BLOCK.fullmatch(name)
    inner = match[2] if match else ""
    prefix = f"blocks.{match[1]}." if match else ""
    try:
        if inner == FUSED:
            rows = tensor.reshape(len(LETTERS), 1, 1, -1)
            return {f"{prefix}att.time_maa_{letter}": row for letter, row in zip(LETTERS, rows, strict=True)}
        if target := VECTORS.get(inner) or SEPARATE.get(inner):
            return {prefix + target: tensor.reshape(1, 1, -1)}
        if target := TRANSPOSED.get(inner):
            return {prefix + target: tensor.reshape(-1, tensor.shape[-1]).t().contiguous()}
        if target := SWAPPED.get(inner):
            swapped = tensor.reshape(len(LETTERS), -1, tensor.shape[-1]).transpose(1, 2)
            return {prefix + target: swapped.contiguous()}
        if target := HEADS.get(inner):
            return {prefix + target: tensor.reshape(-1, head_size) if tensor.dim() == 1 and head_size else tensor}
    except RuntimeError as error:
        raise CheckpointError(f"{name!r:.80} has the impossible shape {tuple(tensor.shape)}") from error
    official = to_official_name(name)
    return {official: tensor.reshape(-1, tensor.shape[-1]) if is_matrix(official) else tensor}


def plan_output_tensors(names: Iterable[str]) -> list[OutputTensor]:
    """List the tensors of a GGUF file for official `names`, in their order."""
    outside = {target: gguf_name for gguf_name, target in OUTSIDE.items()}
    inside = {
        target: gguf_name for gguf_name, target in (MATRICES | NORMS | VECTORS | TRANSPOSED | SWAPPED | HEADS).items()
    }
    outputs = []
    for name in names:
        match = OFFICIAL_BLOCK.fullmatch(name)
        if name in outside or match is None:
            outputs.append(OutputTensor(outside[name], (name,)))
        elif match[2] in inside:
            outputs.append(OutputTensor(f"blk.{match[1]}.{inside[match[2]]}", (name,)))
        elif match[2] == SEPARATE["time_mix_lerp_w.weight"]:
            sources = tuple(f"blocks.{match[1]}.{target}" for target in SEPARATE.values())
            outputs.append(OutputTensor(f"blk.{match[1]}.{FUSED}", sources))
    return outputs


def to_gguf(output: OutputTensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor of `output` as it is in the file."""
    tensor = tensors[output.sources[0]]
    match = BLOCK.fullmatch(output.name)
    inner = match[2] if match else ""
    if inner == FUSED:
        return torch.stack([tensors[name].reshape(1, 1, -1) for name in output.sources])
    if inner in VECTORS:
        return tensor.reshape(-1)
    if inner in TRANSPOSED:
        return tensor.t()
    return tensor.transpose(1, 2) if inner in SWAPPED else tensor
