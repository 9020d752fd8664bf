"""The official tensor names and shapes of a complete checkpoint of each version.

Detection, checks and writing all use this table, so that a file is checked before any model is built. A test checks
that the model classes agree with it. There are no official checkpoints of the transformer; its names are those of
fledge/models/transformer.py.

L layers, C = n_embd, A = dim_att, F = dim_ffn, H heads of N channels, V rows of the vocabulary,
Dm and Dd the ranks of Finch's token-shift and decay LoRAs.
"""

from __future__ import annotations

from fledge.models.config import ModelConfig

Shape = tuple[int, ...]


def get_expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return official name -> shape of every tensor of such a checkpoint, in the order of the official trainer."""
    vocabulary, width = config.vocab_size, config.n_embd
    transformer = config.version == "llama"
    block, norm = (_transformer_block(config), _scale) if transformer else (_block(config), _norm)
    shapes: dict[str, Shape] = {"emb.weight": (vocabulary, width)}
    for layer in range(config.n_layer):
        norms = ("ln1", "ln2", "ln0") if layer == 0 and not transformer else ("ln1", "ln2")
        for name in norms:
            shapes |= norm(f"blocks.{layer}.{name}", width)
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= norm("ln_out", width)
    shapes["head.weight"] = (vocabulary, width)
    return shapes


def _block(config: ModelConfig) -> dict[str, Shape]:
    """The tensors of one block without its norms, with names relative to the block (`att.key.weight`)."""
    attention = {"4": _attention_4, "5": _attention_5, "6": _attention_6}[config.generation](config)
    if config.tuned_state:
        attention = {"time_state": (config.n_head, config.head_size, config.head_size)} | attention  # (H, V, K)
    return {
        **{f"att.{name}": shape for name, shape in attention.items()},
        **{f"ffn.{name}": shape for name, shape in _channel_mix(config).items()},
    }


def _norm(prefix: str, width: int) -> dict[str, Shape]:
    return {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}


def _scale(prefix: str, width: int) -> dict[str, Shape]:
    return {f"{prefix}.weight": (width,)}


def _mixes(kind: str, letters: str, width: int) -> dict[str, Shape]:
    return {f"{kind}_{letter}": (1, 1, width) for letter in letters}


def _projections(config: ModelConfig, *names: str) -> dict[str, Shape]:
    inner, width = config.dim_att, config.n_embd
    return {f"{name}.weight": (width, inner) if name == "output" else (inner, width) for name in names}


def _attention_4(config: ModelConfig) -> dict[str, Shape]:
    return {
        "time_decay": (config.dim_att,),
        "time_first": (config.dim_att,),
        **_mixes("time_mix", "kvr", config.n_embd),
        **_projections(config, "key", "value", "receptance", "output"),
    }


def _attention_5(config: ModelConfig) -> dict[str, Shape]:
    """5.0 has no gate; 5.0 and 5.1 have one decay and one bonus per head, 5.2 one per channel."""
    gate = config.version != "5.0"
    per_head = (config.n_head, config.head_size) if config.version == "5.2" else (config.n_head,)
    return {
        **_mixes("time_mix", "kvrg" if gate else "kvr", config.n_embd),
        "time_decay": per_head,
        config.bonus: per_head,
        **_projections(config, "receptance", "key", "value", "output", *(["gate"] if gate else [])),
        **_norm("ln_x", config.dim_att),
    }


def _attention_6(config: ModelConfig) -> dict[str, Shape]:
    inner, width, mix, decay = config.dim_att, config.n_embd, config.mix_rank, config.decay_rank
    return {
        **_mixes("time_maa", "xwkvrg", width),
        "time_maa_w1": (width, 5 * mix),
        "time_maa_w2": (5, mix, width),
        "time_decay": (1, 1, inner),
        "time_decay_w1": (width, decay),
        "time_decay_w2": (decay, inner),
        "time_faaaa": (config.n_head, config.head_size),
        **_projections(config, "receptance", "key", "value", "output", "gate"),
        **_norm("ln_x", inner),
    }


def _channel_mix(config: ModelConfig) -> dict[str, Shape]:
    kind = "time_maa" if config.version == "6.0" else "time_mix"
    width, hidden = config.n_embd, config.dim_ffn
    return {
        **_mixes(kind, "kr", width),
        "key.weight": (hidden, width),
        "receptance.weight": (width, width),
        "value.weight": (width, hidden),
    }


def _transformer_block(config: ModelConfig) -> dict[str, Shape]:
    width, hidden = config.n_embd, config.dim_ffn
    attention = _projections(config, "query", "key", "value", "output")
    return {
        **{f"att.{name}": shape for name, shape in attention.items()},
        "ffn.gate.weight": (hidden, width),
        "ffn.key.weight": (hidden, width),
        "ffn.value.weight": (width, hidden),
    }
