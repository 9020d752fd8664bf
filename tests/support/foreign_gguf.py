"""GGUF files of a Finch as llama.cpp's converter writes them, made with the `gguf` package and without fledge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

# Official name in a block -> GGUF name, for tensors that are neither stacked nor omitted.
BLOCK_NAMES = {
    "ln1.weight": "attn_norm.weight",
    "ln1.bias": "attn_norm.bias",
    "ln2.weight": "attn_norm_2.weight",
    "ln2.bias": "attn_norm_2.bias",
    "att.time_maa_x": "time_mix_lerp_x.weight",
    "att.time_maa_w1": "time_mix_w1.weight",
    "att.time_maa_w2": "time_mix_w2.weight",
    "att.time_faaaa": "time_mix_first.weight",
    "att.time_decay": "time_mix_decay.weight",
    "att.time_decay_w1": "time_mix_decay_w1.weight",
    "att.time_decay_w2": "time_mix_decay_w2.weight",
    "att.receptance.weight": "time_mix_receptance.weight",
    "att.key.weight": "time_mix_key.weight",
    "att.value.weight": "time_mix_value.weight",
    "att.gate.weight": "time_mix_gate.weight",
    "att.output.weight": "time_mix_output.weight",
    "att.ln_x.weight": "time_mix_ln.weight",
    "att.ln_x.bias": "time_mix_ln.bias",
    "ffn.time_maa_k": "channel_mix_lerp_k.weight",
    "ffn.time_maa_r": "channel_mix_lerp_r.weight",
    "ffn.key.weight": "channel_mix_key.weight",
    "ffn.receptance.weight": "channel_mix_receptance.weight",
    "ffn.value.weight": "channel_mix_value.weight",
}
GLOBAL_NAMES = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
MIXES = [f"att.time_maa_{letter}" for letter in "wkvrg"]
ALWAYS_F32 = ("lerp", "_w1.", "_w2.", "time_mix_first", "time_mix_decay", "norm", "time_mix_ln")
F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16

Array = np.ndarray[Any, Any]


def convert_tensors(tensors: Mapping[str, Tensor], rescale: int, *, fused: bool = True) -> dict[str, Array]:
    """GGUF name -> float32 array, stacked, transposed and divided as llama.cpp expects."""
    arrays = {}
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        if name in GLOBAL_NAMES:
            arrays[GLOBAL_NAMES[name]] = array
            continue
        _, layer, inner = name.split(".", 2)
        if inner in MIXES:
            if not fused:
                arrays[f"blk.{layer}.time_mix_lerp_{inner[-1]}.weight"] = array.squeeze()
            elif inner == MIXES[0]:
                stack = [tensors[f"blocks.{layer}.{mix}"].float().numpy().reshape(1, 1, -1) for mix in MIXES]
                arrays[f"blk.{layer}.time_mix_lerp_fused.weight"] = np.stack(stack)
            continue
        if inner.endswith(("_w1", "decay_w2")):
            array = array.T
        elif inner.endswith("maa_w2"):
            array = array.transpose(0, 2, 1)
        elif "time_maa" in inner or inner == "att.time_decay":
            array = array.squeeze()
        elif inner in ("att.output.weight", "ffn.value.weight") and rescale:
            array = array / 2 ** (int(layer) // rescale)
        arrays[f"blk.{layer}.{BLOCK_NAMES[inner]}"] = array
    return arrays


def make_keys(tensors: Mapping[str, Tensor], rescale: int) -> dict[str, Any]:
    """The keys of a converted file, without those of the tokenizer."""
    heads, head_size = tensors["blocks.0.att.time_faaaa"].shape
    hidden, width = tensors["blocks.0.ffn.key.weight"].shape
    assert heads * head_size == width
    return {
        "general.type": "model",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "rwkv6.context_length": 1048576,
        "rwkv6.embedding_length": width,
        "rwkv6.block_count": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        "rwkv6.feed_forward_length": hidden,
        "rwkv6.attention.head_count": 0,
        "rwkv6.attention.layer_norm_epsilon": 1e-5,
        "rwkv6.rescale_every_n_layers": rescale,
        "rwkv6.wkv.head_size": head_size,
        "rwkv6.time_mix_extra_dim": 32,  # the converter sets both by a rule, not from the tensors
        "rwkv6.time_decay_extra_dim": 64,
    }


def write(
    path: Path,
    arrays: Mapping[str, Array],
    keys: Mapping[str, Any],
    *,
    kind: Any = F16,
    kinds: Mapping[str, Any] | None = None,
    architecture: str = "rwkv6",
) -> Path:
    """Write `arrays`: small tensors as F32, matrices as `kind`. `kinds` overrides the type of single tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, array in arrays.items():
        tensor_type = F32 if any(part in name for part in ALWAYS_F32) else kind
        tensor_type = (kinds or {}).get(name, tensor_type)
        packed = array if array.dtype == np.int32 else gguf.quants.quantize(np.ascontiguousarray(array), tensor_type)
        writer.add_tensor(name, packed, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_world_keys(tokens: tuple[bytes, ...]) -> dict[str, Any]:
    """The keys of the tokenizer. tokens: the bytes of each id; empty for reserved ids and id 0, the end of text."""
    texts = [
        repr(token)[2:-1] if token else f"[PAD{token_id}]" if token_id else "<s>"
        for token_id, token in enumerate(tokens)
    ]
    return {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [1 if token else 5 if token_id else 3 for token_id, token in enumerate(tokens)],
        "tokenizer.ggml.eot_token_id": 261,
        "tokenizer.chat_template": "rwkv-world",
    }
