"""The official initialization for training from scratch.

For layer l of L and channel n of C: rho = l / (L - 1) (0 in a model of one layer), q = 1 - l / L, c_n = n / C.

tensor                          RWKV-6 Finch                    RWKV-5 Eagle
mix of x, w, k                  1 - c^q                         k: c^q (it is the weight of the current token)
mix of v                        1 - c^q - 0.3 rho               c^q + 0.3 rho
mix of r, g                     1 - c^(q/2)                     c^(q/2)
mix of the channel mix          1 - c^(q^3)                     c^q
time_maa_w1, time_decay_w1      0
time_maa_w2, time_decay_w2      uniform within 0.01
time_decay                      -6 + 5 (n / (A-1))^(0.7 + 1.3 rho), the same in both
time_faaaa                      rho (1 - n / (A-1)) + 0.1 ((n+1) mod 3 - 1), the same in both
ln_x.weight                     ((1 + l) / L)^0.7; all other norms 1, all biases 0
emb                             uniform within 1e-4
head                            orthogonal, gain 0.5 sqrt(V / C), or 0.5 if V <= C
att.receptance, value, ffn.key  orthogonal, gain 1
att.key, att.gate               orthogonal, gain 0.1
att.output, ffn.value, receptance   0

RWKV-4: time_decay -5 + 8 (n / (A-1))^(0.7 + 1.3 rho); time_first log 0.3 + 0.5 ((n+1) mod 3 - 1); mixes as in Eagle;
emb and head as above; att.value and ffn.key orthogonal with gain max(1, sqrt(rows / columns)); all other matrices 0.

Source: the v4neo, x052 and x060 training code. The paper's appendix I differs in the gains and in the last term of
time_faaaa; this module follows the code. Versions 5.0 and 5.1 have no initialization: Fledge only runs their
checkpoints.

The transformer is initialized as GPT-2 and Llama are: matrices from a normal distribution with standard deviation 0.02.
Matrices whose output is added to the residual stream (att.output, ffn.value) are divided by sqrt(2 L), so the sum over
all layers has the same size at any depth. Norms are 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fledge.core.errors import ConfigError
from fledge.models.base import BaseModel
from fledge.models.layers import HeadNorm, LayerNorm, Linear
from fledge.models.transformer import RMSNorm, Transformer

STANDARD_DEVIATION = 0.02


@torch.no_grad()
def init_weights(model: BaseModel, seed: int | None = None) -> None:
    """Initialize every parameter of an RWKV-4, Eagle (5.2), Finch or transformer model in place.

    With a `seed`, the result does not depend on torch's global random state. Raises ConfigError for other versions.
    """
    if model.config.version not in ("4", "5.2", "6.0", "llama"):
        raise ConfigError(f"there is no initialization for version {model.config.version}; train 4, 5.2, 6.0 or llama")
    generator = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    if isinstance(model, Transformer):
        _init_transformer(model, generator)
        return
    for module in model.modules():
        if isinstance(module, LayerNorm | HeadNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
    _init_embedding_and_head(model, generator)
    for layer, block in enumerate(model.blocks):
        _init_mixes(block, layer, model)
        if model.config.version == "4":
            _init_wkv4(block.att, layer, model)
            _init_matrices_4(block, generator)
        else:
            _init_wkv(block.att, layer, model)
            _init_matrices(block, generator)


def _init_transformer(model: Transformer, generator: torch.Generator) -> None:
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, Linear | nn.Embedding):
            is_residual = name.endswith(("att.output", "ffn.value"))
            scale = STANDARD_DEVIATION / math.sqrt(2 * model.config.n_layer) if is_residual else STANDARD_DEVIATION
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * scale)


def _init_embedding_and_head(model: BaseModel, generator: torch.Generator) -> None:
    vocab, width = model.head.weight.shape
    model.emb.weight.copy_(_sample_uniform(model.emb.weight, 1e-4, generator))
    _fill_orthogonal(model.head.weight, 0.5 * math.sqrt(max(vocab / width, 1.0)), generator)


def _init_mixes(block: Any, layer: int, model: BaseModel) -> None:
    L, C = model.config.n_layer, model.config.n_embd
    rho, q = _compute_relative_depth(layer, L), 1 - layer / L
    c = (torch.arange(C) / C).view(1, 1, C)
    current = {  # weight of the current token
        "x": c**q,
        "w": c**q,
        "k": c**q,
        "v": c**q + 0.3 * rho,
        "r": c ** (q / 2),
        "g": c ** (q / 2),
    }
    if model.config.version == "6.0":
        for name, weight in current.items():
            getattr(block.att, f"time_maa_{name}").copy_(1 - weight)
        for parameter in (block.ffn.time_maa_k, block.ffn.time_maa_r):
            parameter.copy_(1 - c ** (q**3))
        return
    for name in ("k", "v", "r", "g"):
        if hasattr(block.att, f"time_mix_{name}"):
            getattr(block.att, f"time_mix_{name}").copy_(current[name])
    for parameter in (block.ffn.time_mix_k, block.ffn.time_mix_r):
        parameter.copy_(c**q)


def _init_wkv(att: Any, layer: int, model: BaseModel) -> None:
    L, A = model.config.n_layer, model.config.dim_att
    rho = _compute_relative_depth(layer, L)
    n = torch.arange(A)
    ratio = n / max(A - 1, 1)
    att.time_decay.copy_((-6 + 5 * ratio ** (0.7 + 1.3 * rho)).view_as(att.time_decay))
    zigzag = 0.1 * ((n + 1) % 3 - 1)
    att.time_faaaa.copy_((rho * (1 - ratio) + zigzag).view_as(att.time_faaaa))
    att.ln_x.weight.fill_(((1 + layer) / L) ** 0.7)
    if model.config.tuned_state:
        att.time_state.zero_()


def _init_wkv4(att: Any, layer: int, model: BaseModel) -> None:
    A, rho = model.config.dim_att, _compute_relative_depth(layer, model.config.n_layer)
    n = torch.arange(A)
    att.time_decay.copy_(-5 + 8 * (n / max(A - 1, 1)) ** (0.7 + 1.3 * rho))
    att.time_first.copy_(math.log(0.3) + 0.5 * ((n + 1) % 3 - 1))


def _init_matrices_4(block: Any, generator: torch.Generator) -> None:
    att, ffn = block.att, block.ffn
    for linear in (att.value, ffn.key):
        rows, columns = linear.weight.shape
        _fill_orthogonal(linear.weight, max(1.0, math.sqrt(rows / columns)), generator)
    for linear in (att.key, att.receptance, att.output, ffn.value, ffn.receptance):
        linear.weight.zero_()


def _init_matrices(block: Any, generator: torch.Generator) -> None:
    att, ffn = block.att, block.ffn
    for linear, gain in ((att.receptance, 1.0), (att.key, 0.1), (att.value, 1.0), (att.gate, 0.1), (ffn.key, 1.0)):
        _fill_orthogonal(linear.weight, gain, generator)
    for linear in (att.output, ffn.value, ffn.receptance):
        linear.weight.zero_()
    if hasattr(att, "time_maa_w1"):
        for down in (att.time_maa_w1, att.time_decay_w1):
            down.zero_()
        for up in (att.time_maa_w2, att.time_decay_w2):
            up.copy_(_sample_uniform(up, 0.01, generator))


def _fill_orthogonal(weight: Tensor, gain: float, generator: torch.Generator) -> None:
    """Sample on the CPU in float32, so a seed gives the same values on every device and in every dtype."""
    weight.copy_(nn.init.orthogonal_(torch.empty(weight.shape), gain=gain, generator=generator))


def _compute_relative_depth(layer: int, n_layer: int) -> float:
    return layer / (n_layer - 1) if n_layer > 1 else 0.0


def _sample_uniform(like: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator) * 2 - 1) * bound
