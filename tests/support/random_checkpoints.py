"""Random checkpoints with the official tensor names, shapes and order, for tests.

The values have the scale of a trained model: norm weights near 1, matrices that keep the variance, decays from very
slow to very fast, LoRA factors far from zero. Logits are of order 1 and every tensor has a visible effect on them, so a
test that compares logits detects a tensor that was dropped, transposed or swapped. This module does not import fledge,
because tests that compare Fledge with another program must not depend on the code under test.
"""

from __future__ import annotations

import torch
from torch import Tensor

VERSIONS = ("4", "5.0", "5.1", "5.2", "6.0")


class _TensorSampler:
    """Samples the kinds of tensors in a checkpoint, from a seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * scale + mean

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator)

    def matrix(self, rows: int, columns: int, gain: float = 1.0) -> Tensor:
        """A weight of a linear layer, (out, in), that maps unit variance to variance gain**2."""
        return self.normal(rows, columns, scale=gain * columns**-0.5)

    def norm(self, prefix: str, size: int) -> dict[str, Tensor]:
        return {
            f"{prefix}.weight": self.normal(size, mean=1, scale=0.1),
            f"{prefix}.bias": self.normal(size, scale=0.1),
        }

    def decay(self, *shape: int) -> Tensor:
        """Raw decays from -6 (exp(-exp(-6)) = 0.998 a token) to 1.5 (0.011 a token), in random order."""
        size = torch.Size(shape).numel()
        ramp = torch.linspace(-6, 1.5, size) if size > 1 else torch.tensor([-1.0])
        return ramp[torch.randperm(size, generator=self._generator)].reshape(shape)


def random_checkpoint(  # noqa: PLR0913 - one argument for each size that a checkpoint can have
    version: str,
    *,
    n_layer: int,
    n_embd: int,
    head_size: int = 8,
    vocab_size: int = 37,
    dim_ffn: int | None = None,
    mix_rank: int = 8,
    decay_rank: int = 12,
    bonus: str = "time_faaaa",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tuned_state: bool = False,
) -> dict[str, Tensor]:
    """The tensors of one model, in the order of the official trainer.

    `version` is one of VERSIONS. `head_size` must divide `n_embd` and is ignored for "4". `dim_ffn` is by default the
    official width. `mix_rank` and `decay_rank` are used for "6.0" only. `bonus` names the tensor with the weight of the
    current token in "5.0" and "5.1": "time_faaaa" (the weight) or "time_first" (its logarithm). `tuned_state` adds
    `att.time_state`, (H, V, K), as the programs for state tuning write it.
    """
    assert version in VERSIONS and bonus in ("time_faaaa", "time_first")
    assert version == "4" or n_embd % head_size == 0
    assert not (tuned_state and version == "4")
    sampler = _TensorSampler(seed)
    heads = n_embd // head_size
    if dim_ffn is None:
        dim_ffn = 4 * n_embd if version in ("4", "5.0") else int(n_embd * 3.5 // 32 * 32)

    tensors = {"emb.weight": sampler.normal(vocab_size, n_embd, scale=0.5)}
    for layer in range(n_layer):
        block = f"blocks.{layer}."
        tensors |= sampler.norm(block + "ln1", n_embd) | sampler.norm(block + "ln2", n_embd)
        if layer == 0:
            tensors |= sampler.norm(block + "ln0", n_embd)
        if version == "4":
            att = _att_4(sampler, n_embd)
        elif version == "6.0":
            att = _att_6(sampler, n_embd, heads, mix_rank, decay_rank)
        else:
            att = _att_5(sampler, version, n_embd, heads, bonus)
        if tuned_state:
            att = {"time_state": sampler.normal(heads, head_size, head_size, scale=0.5)} | att
        tensors |= {f"{block}att.{name}": tensor for name, tensor in att.items()}
        ffn = _ffn(sampler, "time_maa" if version == "6.0" else "time_mix", n_embd, dim_ffn)
        tensors |= {f"{block}ffn.{name}": tensor for name, tensor in ffn.items()}
    tensors |= sampler.norm("ln_out", n_embd)
    tensors["head.weight"] = sampler.matrix(vocab_size, n_embd)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _projections(sampler: _TensorSampler, width: int, *names: str) -> dict[str, Tensor]:
    """Weights of the time mix. Keys have half the scale, so that the sums in a wkv state stay near 10."""
    return {f"{name}.weight": sampler.matrix(width, width, gain=0.5 if name == "key" else 1.0) for name in names}


def _mixes(sampler: _TensorSampler, kind: str, width: int, letters: str) -> dict[str, Tensor]:
    return {f"{kind}_{letter}": sampler.uniform(1, 1, width) for letter in letters}


def _att_4(sampler: _TensorSampler, width: int) -> dict[str, Tensor]:
    return {
        "time_decay": sampler.decay(width),
        "time_first": sampler.normal(width, mean=-1.2, scale=0.5),
        **_mixes(sampler, "time_mix", width, "kvr"),
        **_projections(sampler, width, "key", "value", "receptance", "output"),
    }


def _att_5(sampler: _TensorSampler, version: str, width: int, heads: int, bonus: str) -> dict[str, Tensor]:
    gated = version != "5.0"
    per_head = (heads, width // heads) if version == "5.2" else (heads,)
    name = "time_faaaa" if version == "5.2" else bonus
    u = sampler.normal(*per_head, mean=0.4, scale=0.5) if name == "time_faaaa" else sampler.normal(*per_head, mean=-0.7)
    return {
        **_mixes(sampler, "time_mix", width, "kvrg" if gated else "kvr"),
        "time_decay": sampler.decay(*per_head),
        name: u,
        **_projections(sampler, width, "receptance", "key", "value", "output", *(["gate"] if gated else [])),
        **sampler.norm("ln_x", width),
    }


def _att_6(sampler: _TensorSampler, width: int, heads: int, mix_rank: int, decay_rank: int) -> dict[str, Tensor]:
    return {
        **_mixes(sampler, "time_maa", width, "xwkvrg"),
        "time_maa_w1": sampler.normal(width, 5 * mix_rank, scale=width**-0.5),
        "time_maa_w2": sampler.normal(5, mix_rank, width, scale=0.5 * mix_rank**-0.5),
        "time_decay": sampler.decay(1, 1, width),
        "time_decay_w1": sampler.normal(width, decay_rank, scale=width**-0.5),
        "time_decay_w2": sampler.normal(decay_rank, width, scale=decay_rank**-0.5),
        "time_faaaa": sampler.normal(heads, width // heads, mean=0.4, scale=0.5),
        **_projections(sampler, width, "receptance", "key", "value", "output", "gate"),
        **sampler.norm("ln_x", width),
    }


def _ffn(sampler: _TensorSampler, kind: str, width: int, hidden: int) -> dict[str, Tensor]:
    return {
        **_mixes(sampler, kind, width, "kr"),
        "key.weight": sampler.matrix(hidden, width),
        "receptance.weight": sampler.matrix(width, width),
        "value.weight": sampler.matrix(width, hidden),
    }
