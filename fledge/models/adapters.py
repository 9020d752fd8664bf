"""LoRA and fully trained parameters, applied to a model without copying its weights.

W becomes W + scale B A, with scale = alpha / r (Hu et al., "LoRA", 2021), for any of the Linears in `TARGETS`. The
factors have the names of RWKV-PEFT:

    blocks.<i>.att.key.lora_A   A (r, in), initialized with the uniform distribution of Kaiming, a = sqrt(5)
    blocks.<i>.att.key.lora_B   B (out, r), initialized to zero, so an untrained adapter changes nothing

The effects of two adapters add up. `combine_factors` makes them one adapter of rank r1 + r2, so a Linear never has more
than one. A tuned initial state is not an adapter: it is a `State` from which a text starts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fledge.core.errors import UsageError
from fledge.models.base import BaseModel
from fledge.models.config import ModelConfig
from fledge.models.layers import Linear
from fledge.models.state import State, tuned_state

TARGETS = (
    *("att.receptance", "att.key", "att.value", "att.gate", "att.output"),
    *("ffn.key", "ffn.receptance", "ffn.value"),
)
"""The matrices that can have factors, by their names in a block. RWKV-4 and 5.0 have no gate."""


class LoraFactors(NamedTuple):
    """The factors of one Linear: y += scale B (A x)."""

    down: Tensor  # A (r, in)
    up: Tensor  # B (out, r)
    scale: float  # alpha / r


class LoraLinear(Linear):
    """A Linear that shares the weight of another one and adds a low-rank product.

    The low-rank product is computed in `compute_dtype` if it is set, else in float32. The sum is float32.
    """

    def __init__(self, linear: Linear, factors: LoraFactors) -> None:
        nn.Module.__init__(self)
        self.register_parameter("weight", linear.weight)
        self.compute_dtype, self.packed = linear.compute_dtype, linear.packed
        self.lora_A = nn.Parameter(factors.down)
        self.lora_B = nn.Parameter(factors.up)
        self.scale = factors.scale

    @property
    def factors(self) -> LoraFactors:
        """The factors, as parameters."""
        return LoraFactors(self.lora_A, self.lora_B, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """The sum in float32, unlike that of a plain Linear: in bfloat16 a small change would be rounded away."""
        dtype = self.compute_dtype or torch.float32
        low = nn.functional.linear(x.to(dtype), self.lora_A.to(dtype))  # (..., r)
        return super().forward(x).float() + self.scale * nn.functional.linear(low, self.lora_B.to(dtype)).float()


def add_lora(model: BaseModel, factors: Mapping[str, LoraFactors]) -> None:
    """Add factors to the Linears with these names (`blocks.<i>.att.key`), in place. The factors require gradients.

    The weights stay the same tensors. If a Linear already has factors, both apply.
    """
    for name, added in factors.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear), name
        combined = _concatenate([linear.factors, added]) if isinstance(linear, LoraLinear) else added
        _replace(model, name, LoraLinear(linear, combined))


def build_adapted_model(
    model: BaseModel, factors: Mapping[str, LoraFactors], parts: Mapping[str, Tensor] | None = None
) -> BaseModel:
    """A new model with the weights of `model`, these factors, and `parts` as replacements of whole parameters.

    Weights are shared, not copied: several adapted models need little more memory than one. For inference: the factors
    and parts require no gradient. `model` is not changed.
    """
    adapted = copy_sharing_weights(model)
    device = model.emb.weight.device
    add_lora(
        adapted,
        {name: LoraFactors(one.down.to(device), one.up.to(device), one.scale) for name, one in factors.items()},
    )
    for name in factors:
        adapted.get_submodule(name).requires_grad_(False)
    for name, tensor in (parts or {}).items():
        dtype = _discard_packed(adapted, name)
        _replace(adapted, name, nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False))
    return adapted


def _discard_packed(model: BaseModel, name: str) -> torch.dtype:
    """The dtype of a parameter that will be replaced. Removes the packed copy of its Linear, if there is one."""
    linear = model.get_submodule(name.rpartition(".")[0])
    if isinstance(linear, Linear) and linear.packed is not None:
        dtype, linear.packed = linear.packed.dtype, None
        return dtype
    return model.get_parameter(name).dtype


def _replace(model: BaseModel, name: str, part: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def copy_sharing_weights(model: BaseModel) -> BaseModel:
    """A copy of the modules that shares all tensors with `model`."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    shared += [module.packed for module in model.modules() if isinstance(module, Linear) and module.packed is not None]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def combine_factors(adapters: Sequence[Mapping[str, LoraFactors]]) -> dict[str, LoraFactors]:
    """Combine several adapters into one: B1 A1 + B2 A2 = [B1 B2] [A1; A2]."""
    by_name: dict[str, list[LoraFactors]] = {}
    for adapter in adapters:
        for name, factors in adapter.items():
            by_name.setdefault(name, []).append(factors)
    return {name: group[0] if len(group) == 1 else _concatenate(group) for name, group in by_name.items()}


def _concatenate(factors: Sequence[LoraFactors]) -> LoraFactors:
    down = torch.cat([one.down.detach().float() for one in factors])
    up = torch.cat([one.scale * one.up.detach().float() for one in factors], dim=1)
    return LoraFactors(down, up, 1.0)


def merge_weight(weight: Tensor, factors: LoraFactors, dtype: torch.dtype | None = None) -> Tensor:
    """W + scale B A, computed in float32 and rounded once to `dtype` (None: that of W)."""
    change = factors.up.float() @ factors.down.float()
    return torch.add(weight.float(), change, alpha=factors.scale).to(dtype or weight.dtype)


def select_targets(model_names: Iterable[str], targets: Sequence[str] = TARGETS) -> list[str]:
    """The names of the Linears that match `targets`, in the order of `model_names` (names of parameters).

    targets: entries of TARGETS, or their last part ("key" selects att.key and ffn.key). Raises UsageError for a target
    that is unknown or that the model does not have.
    """
    names = [name.removesuffix(".weight") for name in model_names if name.startswith("blocks.")]
    selected: set[str] = set()
    for target in targets:
        matches = {name for name in TARGETS if target in (name, name.split(".")[1])}
        if not matches:
            raise UsageError(f"LoRA target {target!r:.40} is unknown; choose among {', '.join(TARGETS)}")
        if target not in TARGETS or tuple(targets) != TARGETS:
            _check_present(target, matches, names)
        selected |= matches
    return [name for name in names if name.split(".", 2)[-1] in selected]


def _check_present(target: str, matches: set[str], names: Sequence[str]) -> None:
    if not any(name.split(".", 2)[-1] in matches for name in names):
        raise UsageError(f"this model has no {target}; leave it out of the LoRA targets")


def init_factors(model: BaseModel, names: Sequence[str], rank: int, alpha: float, seed: int) -> dict[str, LoraFactors]:
    """Untrained factors for the Linears `names`. They are sampled on the CPU, so a seed gives the same everywhere."""
    if rank < 1 or not alpha > 0:
        raise UsageError(f"a LoRA needs a rank of at least 1 and an alpha above 0, not {rank} and {alpha:g}")
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, LoraFactors] = {}
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        n_out, n_in = weight.shape
        bound = 1 / math.sqrt(n_in)  # the uniform distribution of Kaiming with a = sqrt(5)
        down = (torch.rand(rank, n_in, generator=generator) * 2 - 1) * bound
        zero = torch.zeros(n_out, rank)
        factors[name] = LoraFactors(down.to(weight.device), zero.to(weight.device), alpha / rank)
    return factors


def build_tuned_state(config: ModelConfig, tuned: Mapping[str, Tensor]) -> State:
    """The initial state of one sequence from tuned tensors `blocks.<i>.att.time_state` (H, V, K), as in files."""
    return tuned_state(config, [tuned[f"blocks.{layer}.att.time_state"].detach() for layer in range(config.n_layer)], 1)
