"""Apply and create the config.json of Hugging Face folders.

Sizes are detected from the tensors, and config.json must agree with them. It adds the epsilons, which shapes do not
show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fledge.checkpoint.formats.huggingface.folder import MODEL_TYPES
from fledge.core.errors import CheckpointError
from fledge.models.config import ModelConfig

MAX_NUMBER = 1e6  # for settings that are not sizes; the squares of much larger numbers overflow
GROUP_NORM_BASE = 1e-5  # the remote code's group norm has this epsilon times head_size_divisor squared
CLASSES = {"rwkv": "Rwkv", "rwkv5": "Rwkv5", "rwkv6": "Rwkv6"}


def apply_hf_config(config: ModelConfig, settings: Mapping[str, Any], layout: str, source: str) -> ModelConfig:
    """Return `config`, as detected from tensors, with the epsilons of config.json (`settings`).

    Raises CheckpointError if they disagree on a size. From a fla folder, only the epsilon of the LayerNorms is used:
    formats/fla.py explains why its group norm keeps 64e-5. `num_attention_heads` is ignored, because it is 64 in every
    published folder.
    """
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer}
    if layout == "fla":
        sizes["num_heads"] = config.n_head
    elif config.n_head:
        sizes["head_size"] = config.head_size
    for name, value in sizes.items():
        if settings.get(name, value) != value:
            raise CheckpointError(
                f"{source}: config.json says {name} {settings[name]!r:.40}, its tensors say {value}; the folder "
                "contains files of two models"
            )
    eps = _get_number(settings, "norm_eps" if layout == "fla" else "layer_norm_epsilon", config.norm_eps, source)
    config = replace(config, norm_eps=eps)
    if layout == "fla" or not config.n_head or "head_size_divisor" not in settings:
        return config
    divisor = _get_number(settings, "head_size_divisor", 8, source)
    return replace(config, group_norm_eps=GROUP_NORM_BASE * divisor**2)


def make_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Create config.json for the remote code of rwkv5 and rwkv6, and for the rwkv class of transformers (version 4)."""
    kind = MODEL_TYPES[config.version]
    name = CLASSES[kind]
    settings: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "attention_hidden_size": config.dim_att,
        "intermediate_size": config.dim_ffn,
        "layer_norm_epsilon": config.norm_eps,
        "rescale_every": 6,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    if config.version == "4":
        return settings
    settings["auto_map"] = {
        "AutoConfig": f"configuration_{kind}.{name}Config",
        "AutoModelForCausalLM": f"modeling_{kind}.{name}ForCausalLM",
    }
    divisor = math.sqrt(config.group_norm_eps / GROUP_NORM_BASE)
    settings["head_size"] = config.head_size
    settings["head_size_divisor"] = round(divisor) if math.isclose(divisor, round(divisor)) else divisor
    return settings


def make_fla_config(config: ModelConfig) -> dict[str, Any]:
    """Create config.json for RWKV6ForCausalLM of flash-linear-attention."""
    return {
        "architectures": ["RWKV6ForCausalLM"],
        "model_type": "rwkv6",
        "attn_mode": "chunk",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_heads": config.n_head,
        "expand_k": config.dim_att / config.n_embd,
        "expand_v": config.dim_att / config.n_embd,
        "hidden_ratio": config.dim_ffn / config.n_embd,
        "intermediate_size": config.dim_ffn,
        "hidden_act": "sqrelu",
        "proj_low_rank_dim": config.mix_rank,
        "gate_low_rank_dim": config.decay_rank,
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": config.norm_eps,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def list_hf_notes(config: ModelConfig) -> tuple[str, ...]:
    """List the settings of this model that the remote code does not use; empty if it uses all."""
    notes = []
    if config.version != "4":
        kind = MODEL_TYPES[config.version]
        notes.append(
            f"to use the folder, add configuration_{kind}.py and modeling_{kind}.py from an original {kind} repository"
        )
        computed = int(config.n_embd * 3.5 // 32 * 32)
        if config.dim_ffn != computed:
            notes.append(f"the {kind} code computes intermediate_size {computed}; this model has {config.dim_ffn}")
    if config.version == "6.0" and (config.mix_rank, config.decay_rank) != _get_code_ranks(config.n_embd):
        notes.append(
            f"the rwkv6 code computes LoRA ranks {_get_code_ranks(config.n_embd)} from the width; this model has "
            f"({config.mix_rank}, {config.decay_rank})"
        )
    if config.tuned_state:
        notes.append("the remote code ignores the tuned initial state; Fledge uses it")
    return tuple(notes)


FLA_NOTES = (
    "flash-linear-attention uses norm_eps for its group norm too; Finch needs 64e-5: set g_norm.eps in every layer",
)


def _get_code_ranks(width: int) -> tuple[int, int]:
    return (64, 128) if width == 4096 else (32, 64)


def _get_number(settings: Mapping[str, Any], name: str, default: float, source: str) -> float:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_NUMBER:
        raise CheckpointError(
            f"{source}: config.json says {name} {value!r:.40}; it must be a positive number below {MAX_NUMBER:.0f}"
        )
    return value
