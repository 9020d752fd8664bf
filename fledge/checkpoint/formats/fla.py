"""Convert to and from the RWKV-6 layout of flash-linear-attention: names, transposes and the order of the five mixes.

Official files have the slices of the token-shift LoRA in the order w, k, v, r, g. This layout has r, w, k, v, g, and
stacks the five static mixes in one tensor. Every change is a permutation of values, so a round trip is exact.

Hazard: the group norm of flash-linear-attention uses `norm_eps` of the config, which is 1e-5 in published folders, but
every Finch was trained with 64e-5 there. Fledge always uses 64e-5 for the group norm of such a folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fledge.core.errors import CheckpointError

OFFICIAL_ORDER = "wkvrg"
FLA_ORDER = "rwkvg"
TO_FLA = [OFFICIAL_ORDER.index(letter) for letter in FLA_ORDER]
TO_OFFICIAL = [FLA_ORDER.index(letter) for letter in OFFICIAL_ORDER]

OUTSIDE = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
# Tensors of a block that are only renamed.
PLAIN = {
    **{f"{a}.{part}": f"{b}.{part}" for a, b in (("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm"))
       for part in ("weight", "bias")},
    **{f"att.{name}.weight": f"attn.{name[0]}_proj.linear.weight" for name in ("receptance", "key", "value", "gate")},
    "att.output.weight": "attn.o_proj.weight",
    "att.time_faaaa": "attn.bonus",
    "att.ln_x.weight": "attn.g_norm.weight",
    "att.ln_x.bias": "attn.g_norm.bias",
    "ffn.key.weight": "ffn.key.linear.weight",
    "ffn.receptance.weight": "ffn.receptance.linear.weight",
    "ffn.value.weight": "ffn.value.weight",
}  # fmt: skip
# Vectors: (1, 1, n) in official files, (n) here.
VECTORS = {
    "att.time_maa_x": "attn.x_proj.0.mu",
    "att.time_decay": "attn.w_proj.linear.lora.2.bias",
    "ffn.time_maa_k": "ffn.key.mu",
    "ffn.time_maa_r": "ffn.receptance.mu",
}
TRANSPOSED = {
    "att.time_decay_w1": "attn.w_proj.linear.lora.0.weight",
    "att.time_decay_w2": "attn.w_proj.linear.lora.2.weight",
}
MIX_IN, MIX_OUT, MIX_STATIC = "attn.x_proj.0.linear.weight", "attn.x_proj.2.weight", "attn.x_bias"
BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")

Parts = dict[str, Tensor]


def from_fla(tensors: Mapping[str, Tensor]) -> Parts:
    """Convert this layout to official names and shapes. Unknown names are kept, so that a later check reports them.

    Raises CheckpointError for a tensor of impossible shape, and for one that also exists under its official name.
    """
    outside = {fla_name: official_name for official_name, fla_name in OUTSIDE.items()}
    official: Parts = {}
    for name, tensor in tensors.items():
        match = BLOCK.fullmatch(name)
        if match is None or match[2] not in CONVERSIONS:
            parts = {outside.get(name, name): tensor}
        else:
            try:
                parts = {f"blocks.{match[1]}.{part}": value for part, value in CONVERSIONS[match[2]](tensor).items()}
            except (RuntimeError, IndexError) as error:
                raise CheckpointError(f"{name!r:.80} has the impossible shape {tuple(tensor.shape)}") from error
        if parts.keys() & official.keys():
            raise CheckpointError(f"{name!r:.80} also exists under its official name; remove one of them")
        official |= parts
    return official


def to_fla(tensors: Mapping[str, Tensor]) -> Parts:
    """Convert official names and shapes of a Finch to this layout."""
    converted = {OUTSIDE[name]: tensor for name, tensor in tensors.items() if name in OUTSIDE}
    layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")})
    for layer in layers:
        prefix = f"blocks.{layer}."
        block = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        converted |= {f"model.layers.{layer}.{name}": tensor for name, tensor in _block_to_fla(block).items()}
    return converted


def _block_to_fla(block: Parts) -> Parts:
    parts = {fla_name: block[official_name] for official_name, fla_name in PLAIN.items() if official_name in block}
    parts |= {fla_name: block[official_name].reshape(-1) for official_name, fla_name in VECTORS.items()}
    parts |= {fla_name: block[official_name].t().contiguous() for official_name, fla_name in TRANSPOSED.items()}
    w1, w2 = block["att.time_maa_w1"], block["att.time_maa_w2"]  # (C, 5 Dm), (5, Dm, C)
    parts[MIX_IN] = w1.unflatten(1, (5, -1))[:, TO_FLA].flatten(1).t().contiguous()  # (5 Dm, C)
    parts[MIX_OUT] = w2[TO_FLA].permute(2, 0, 1).flatten(1).contiguous()  # (C, 5 Dm)
    static = [block[f"att.time_maa_{letter}"].reshape(-1) for letter in FLA_ORDER]
    if len({tensor.dtype for tensor in static}) > 1:
        raise CheckpointError("the five att.time_maa_{r,w,k,v,g} have several dtypes; this layout stores them as one")
    parts[MIX_STATIC] = torch.stack(static)  # (5, C)
    return parts


def _convert_mix_in(tensor: Tensor) -> Parts:
    return {"att.time_maa_w1": tensor.t().unflatten(1, (5, -1))[:, TO_OFFICIAL].flatten(1).contiguous()}


def _convert_mix_out(tensor: Tensor) -> Parts:
    return {"att.time_maa_w2": tensor.unflatten(1, (5, -1)).permute(1, 2, 0)[TO_OFFICIAL].contiguous()}


def _convert_mix_static(tensor: Tensor) -> Parts:
    if tensor.dim() != 2 or len(tensor) != len(FLA_ORDER):
        raise IndexError
    return {f"att.time_maa_{letter}": row.reshape(1, 1, -1) for letter, row in zip(FLA_ORDER, tensor, strict=True)}


def _make_rename(official_name: str) -> Callable[[Tensor], Parts]:
    return lambda tensor: {official_name: tensor}


def _make_reshape(official_name: str) -> Callable[[Tensor], Parts]:
    return lambda tensor: {official_name: tensor.reshape(1, 1, -1)}


def _make_transpose(official_name: str) -> Callable[[Tensor], Parts]:
    return lambda tensor: {official_name: tensor.t().contiguous()}


CONVERSIONS: dict[str, Callable[[Tensor], Parts]] = {
    **{fla_name: _make_rename(official_name) for official_name, fla_name in PLAIN.items()},
    **{fla_name: _make_reshape(official_name) for official_name, fla_name in VECTORS.items()},
    **{fla_name: _make_transpose(official_name) for official_name, fla_name in TRANSPOSED.items()},
    MIX_IN: _convert_mix_in,
    MIX_OUT: _convert_mix_out,
    MIX_STATIC: _convert_mix_static,
}
