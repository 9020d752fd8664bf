"""LoRA and fully trained parts around a model from outside: no family knows of them, and no weight is copied.

W becomes W + scale B A, with scale = alpha / r (Hu et al., "LoRA", 2021), on any of the Linears in `TARGETS`. The
factors are called as RWKV-PEFT calls them, and so loads and saves them:

    blocks.<i>.att.key.lora_A   A (r, in), drawn as Kaiming's uniform with a = sqrt(5)
    blocks.<i>.att.key.lora_B   B (out, r), zero at first, so that an untrained adapter changes nothing

Two adapters at once add up; as factors that is one of rank r1 + r2 (`stacked`), so a Linear never has more than one.
A tuned initial state is no adapter in this sense: it is a `State`, a value that a text begins from.
Not here: files (fledge.checkpoint.adapters.files), training (fledge.train.tuning.settings).
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
"""What can have factors, as it is called inside a block: the products of all versions (5.0 and RWKV-4 have no gate)."""


class LoraFactors(NamedTuple):
    """What is added to one Linear: y += scale B (A x)."""

    down: Tensor  # A (r, in)
    up: Tensor  # B (out, r)
    scale: float  # alpha / r


class LoraLinear(Linear):
    """A Linear that shares its weight with the one it was made of, and adds a product of low rank.

    The factors are float32, or `compute_dtype` as for the weight, if it is set; the sum is float32.
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
        """What it adds."""
        return LoraFactors(self.lora_A, self.lora_B, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or torch.float32
        low = nn.functional.linear(x.to(dtype), self.lora_A.to(dtype))  # (..., r)
        return super().forward(x) + self.scale * nn.functional.linear(low, self.lora_B.to(dtype)).float()


def add_lora(model: BaseModel, factors: Mapping[str, LoraFactors]) -> None:
    """Give the Linears called `blocks.<i>.att.key` and so on their factors, which require gradients.

    In place; the weights stay the same tensors. Factors that a Linear has already stay in force: the two add up.
    """
    for name, given in factors.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear), name
        both = _joined([linear.factors, given]) if isinstance(linear, LoraLinear) else given
        _put(model, name, LoraLinear(linear, both))


def adapted(
    model: BaseModel, factors: Mapping[str, LoraFactors], parts: Mapping[str, Tensor] | None = None
) -> BaseModel:
    """Another model on the same weights: with these factors, and with `parts` in place of parameters of those names.

    Nothing is copied but the tree of modules, so any number of adapted models cost the memory of one. For inference:
    what is new requires no gradient. `model` stays as it is.
    """
    twin = shared_copy(model)
    device = model.emb.weight.device
    add_lora(
        twin, {name: LoraFactors(one.down.to(device), one.up.to(device), one.scale) for name, one in factors.items()}
    )
    for name in factors:
        twin.get_submodule(name).requires_grad_(False)
    for name, tensor in (parts or {}).items():
        dtype = _unpacked(twin, name)
        _put(twin, name, nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False))
    return twin


def _unpacked(model: BaseModel, name: str) -> torch.dtype:
    """The dtype of a parameter that will be replaced; where its Linear holds a packed copy, that goes."""
    linear = model.get_submodule(name.rpartition(".")[0])
    if isinstance(linear, Linear) and linear.packed is not None:
        dtype, linear.packed = linear.packed.dtype, None
        return dtype
    return model.get_parameter(name).dtype


def _put(model: BaseModel, name: str, part: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def shared_copy(model: BaseModel) -> BaseModel:
    """A tree of modules of its own around the very same tensors."""
    kept: list[Tensor] = [*model.parameters(), *model.buffers()]
    kept += [module.packed for module in model.modules() if isinstance(module, Linear) and module.packed is not None]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})


def stacked(adapters: Sequence[Mapping[str, LoraFactors]]) -> dict[str, LoraFactors]:
    """Several adapters as one: B1 A1 + B2 A2 = [B1 B2] times A1 stacked on A2."""
    together: dict[str, list[LoraFactors]] = {}
    for adapter in adapters:
        for name, factors in adapter.items():
            together.setdefault(name, []).append(factors)
    return {name: found[0] if len(found) == 1 else _joined(found) for name, found in together.items()}


def _joined(found: Sequence[LoraFactors]) -> LoraFactors:
    down = torch.cat([one.down.detach().float() for one in found])
    up = torch.cat([one.scale * one.up.detach().float() for one in found], dim=1)
    return LoraFactors(down, up, 1.0)


def merged_weight(weight: Tensor, factors: LoraFactors, dtype: torch.dtype | None = None) -> Tensor:
    """W + scale B A in float32, rounded once to `dtype`; None is that of W."""
    change = factors.up.float() @ factors.down.float()
    return torch.add(weight.float(), change, alpha=factors.scale).to(dtype or weight.dtype)


def target_names(model_names: Iterable[str], targets: Sequence[str] = TARGETS) -> list[str]:
    """Names of the Linears that have a weight among `model_names` and are one of `targets`, in the model's order.

    targets: entries of TARGETS, or their last word ("key" is both att.key and ffn.key). Raises UsageError for one that
    is unknown, or that this model does not have.
    """
    names = [name.removesuffix(".weight") for name in model_names if name.startswith("blocks.")]
    wanted: set[str] = set()
    for target in targets:
        found = {known for known in TARGETS if target in (known, known.split(".")[1])}
        if not found:
            raise UsageError(f"LoRA target {target!r:.40} is unknown; choose among {', '.join(TARGETS)}")
        if target not in TARGETS or tuple(targets) != TARGETS:
            _check_present(target, found, names)
        wanted |= found
    return [name for name in names if name.split(".", 2)[-1] in wanted]


def _check_present(target: str, found: set[str], names: Sequence[str]) -> None:
    if not any(name.split(".", 2)[-1] in found for name in names):
        raise UsageError(f"this model has no {target}; leave it out of the LoRA targets")


def fresh_factors(model: BaseModel, names: Sequence[str], rank: int, alpha: float, seed: int) -> dict[str, LoraFactors]:
    """Untrained factors for the Linears `names`. Drawn on the CPU, so that a seed means the same everywhere."""
    if rank < 1 or not alpha > 0:
        raise UsageError(f"a LoRA needs a rank of at least 1 and an alpha above 0, not {rank} and {alpha:g}")
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, LoraFactors] = {}
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        n_out, n_in = weight.shape
        bound = 1 / math.sqrt(n_in)  # Kaiming's uniform with a = sqrt(5)
        down = (torch.rand(rank, n_in, generator=generator) * 2 - 1) * bound
        zero = torch.zeros(n_out, rank)
        factors[name] = LoraFactors(down.to(weight.device), zero.to(weight.device), alpha / rank)
    return factors


def start_state(config: ModelConfig, tuned: Mapping[str, Tensor]) -> State:
    """The state of one sequence that begins as tuned: `blocks.<i>.att.time_state` (H, V, K), as files have it."""
    return tuned_state(config, [tuned[f"blocks.{layer}.att.time_state"].detach() for layer in range(config.n_layer)], 1)
