"""Adapters in files: LoRA factors, parts trained whole, tuned initial states; Fledge's own and those of RWKV-PEFT.

    .safetensors    with a record in the header's string map under KEY: kind, alpha, rank, targets, the base it is for
    .pth            tensors only, as RWKV-PEFT and the state tuners of RWKV-LM write and read them: alpha is not in it

In both the names are official: `blocks.<i>.att.key.lora_A` (r, in) and `.lora_B` (out, r); a part trained whole has the
name of the parameter it replaces; `blocks.<i>.att.time_state` is (H, V, K). An adapter only makes sense on the weights
it was trained on, so its base's identity is compared before it is used.
Not here: what names say (adapter_names.py), adding an adapter to a model (fledge.models.adapters), merging it into a
checkpoint (merging.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fledge.checkpoint.adapters.names import FACTOR, detect_kind, is_adapter, strip_prefixes
from fledge.checkpoint.adapters.tuned_state import STATE, merge_tuned_state
from fledge.checkpoint.formats.container import detect_container
from fledge.checkpoint.formats.pth import read_pth, write_pth
from fledge.checkpoint.formats.safetensors import read_safetensors, write_safetensors
from fledge.checkpoint.hub import locate
from fledge.checkpoint.identity import compute_dense_identity, compute_identity, shorten_identity
from fledge.checkpoint.record import Checkpoint
from fledge.checkpoint.shapes import get_expected_shapes
from fledge.checkpoint.writer import check_overwrite
from fledge.core.config import from_dict
from fledge.core.errors import CheckpointError, ConfigError, UnsupportedError, UsageError
from fledge.models.adapters import TARGETS, LoraFactors
from fledge.models.config import ModelConfig

KEY = "fledge_adapter"
FORMAT = 1
KINDS = ("lora", "state")


@dataclass(frozen=True)
class AdapterBase:
    """The model an adapter was trained on."""

    identity: str  # fledge.checkpoint.identity
    name: str
    config: ModelConfig


@dataclass(frozen=True)
class Adapter:
    """One adapter in memory, under official names."""

    kind: str  # "lora" (may have parts trained whole, and a tuned state beside them) or "state"
    tensors: Mapping[str, Tensor]
    alpha: float | None = None  # of the LoRA; None for a tuned state (and, inspected only, a LoRA that does not tell)
    base: AdapterBase | None = None  # a .pth does not tell
    path: Path = Path("adapter")
    training: Mapping[str, Any] = field(default_factory=dict)  # plain JSON: data, steps, rates
    any_base: bool = False  # use it whatever it was trained on

    @property
    def factors(self) -> dict[str, LoraFactors]:
        """`blocks.<i>.att.key` -> what is added to it; empty for a tuned state."""
        found = {match[1] for name in self.tensors if (match := FACTOR.fullmatch(name))}
        return {name: self._factors(name) for name in self._in_order(found)}

    def _factors(self, name: str) -> LoraFactors:
        assert self.alpha is not None
        down, up = self.tensors[f"{name}.lora_A"], self.tensors[f"{name}.lora_B"]
        return LoraFactors(down, up, self.alpha / down.shape[0])

    def _in_order(self, found: set[str]) -> list[str]:
        return sorted(found, key=lambda name: (int(name.split(".")[1]), name))

    @property
    def full_parameters(self) -> dict[str, Tensor]:
        """Parameters that were trained whole, by name; without the tuned state."""
        return {n: t for n, t in self.tensors.items() if not (FACTOR.fullmatch(n) or STATE.fullmatch(n))}

    @property
    def state(self) -> dict[str, Tensor]:
        """`blocks.<i>.att.time_state` -> (H, V, K); empty without a tuned state."""
        return {name: tensor for name, tensor in self.tensors.items() if STATE.fullmatch(name)}

    @property
    def rank(self) -> int:
        """The largest rank of its factors; 0 without any."""
        return max((tensor.shape[0] for name, tensor in self.tensors.items() if name.endswith(".lora_A")), default=0)

    @property
    def targets(self) -> tuple[str, ...]:
        """Which of fledge.models.adapters.TARGETS have factors."""
        found = {match[2] for name in self.tensors if (match := FACTOR.fullmatch(name))}
        return tuple(target for target in TARGETS if target in found)

    @property
    def template(self) -> str | None:
        """The chat template of the conversations it was trained on; None where the file does not tell."""
        told = self.training.get("template")
        return told if isinstance(told, str) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def allow_any_base(self) -> Adapter:
        """The same, to be used on whatever base its shapes fit."""
        return replace(self, any_base=True)


def read_adapter(path: str | os.PathLike[str], *, alpha: float | None = None) -> Adapter:
    """The adapter in a file; what it is shows in its names.

    alpha: of a LoRA in a file that does not record it (any of RWKV-PEFT's); a tuned state has none. Raises UsageError
    where it is needed and missing, or another than the recorded one; CheckpointError for a file that holds no adapter
    or a damaged one.
    """
    found = locate(path)
    if found.is_dir():
        raise CheckpointError(f"{found} is a folder; give the adapter's file")
    if detect_container(found) == "gguf":
        raise CheckpointError(f"{found} is a .gguf; adapters are read from .safetensors and .pth files")
    adapter = _adapter(found, *_contents(found))
    return (
        replace(adapter, alpha=_agreed_alpha(alpha, adapter.alpha, str(found))) if adapter.kind == "lora" else adapter
    )


def read_adapters(files: Sequence[str], *, alpha: float | None = None, any_base: bool = False) -> list[Adapter]:
    """Several, as `read_adapter` reads each. any_base: they may then be used on models they were not trained on."""
    found = [read_adapter(file, alpha=alpha) for file in files]
    return [adapter.allow_any_base() for adapter in found] if any_base else found


def inspect_adapter(path: str | os.PathLike[str]) -> Adapter | None:
    """What the adapter in a file is, without its weights: its tensors are on "meta", and alpha is None where untold.

    None for a file that holds something else, a whole model say. Raises CheckpointError for a damaged adapter.
    """
    found = locate(path)
    if found.is_dir() or detect_container(found) == "gguf":
        return None
    tensors, texts = _contents(found, weights=False)
    return _adapter(found, tensors, texts) if KEY in texts or is_adapter(tensors) else None


def _contents(path: Path, *, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under the file's own names, and the texts of its header."""
    if detect_container(path) == "safetensors":
        return read_safetensors(path, weights=weights)
    return read_pth(path, weights=weights), {}


def _adapter(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> Adapter:
    """The adapter of a file's contents, with the alpha that is recorded if any."""
    record = _decode(texts[KEY], str(path)) if KEY in texts else {}
    tensors = strip_prefixes(tensors, str(path))
    kind = detect_kind(tensors, str(path))
    if record and record["kind"] != kind:
        raise CheckpointError(f"{path}: its header says {record['kind']}, its tensors are a {kind}; it is damaged")
    alpha = record.get("alpha") if kind == "lora" else None
    return Adapter(kind, tensors, alpha, record.get("base"), path, record.get("training", {}))


def save_adapter(path: str | os.PathLike[str], adapter: Adapter) -> tuple[str, ...]:
    """Write an adapter whole or not at all, in the form of the suffix. Returns what that cannot hold, as sentences."""
    path = Path(path)
    if path.suffix == ".safetensors":
        write_safetensors(path, adapter.tensors, {"format": "pt", KEY: _encode(adapter)})
        return ()
    if path.suffix != ".pth":
        raise UsageError(f"{path}: the suffix {path.suffix!r} is no format of adapters; use .safetensors or .pth")
    write_pth(path, adapter.tensors)
    notes = [f"alpha {adapter.alpha:g} is not in a .pth; whoever uses it must be told"] if adapter.alpha else []
    if adapter.template:
        notes.append(f"the chat template is not in a .pth; chat with --template {adapter.template}")
    return (*notes, "a .pth does not say which base it belongs to")


def convert_adapter(
    adapter: Adapter, target: str | os.PathLike[str], *, base: Checkpoint | None = None, force: bool = False
) -> tuple[str, ...]:
    """Write an adapter in the form of the target's suffix, as belonging to `base` if one is given that it fits.

    Raises CheckpointError where the target exists (unless `force`) or the adapter is recorded for another base.
    """
    target = Path(target)
    check_overwrite(target, force)
    if base is not None:
        check_base((adapter,), base)
        adapter = replace(adapter, base=describe_base(base))
    return save_adapter(target, adapter)


def describe_base(checkpoint: Checkpoint, name: str | None = None) -> AdapterBase:
    """The record of a base. Reads all its weights."""
    config = replace(checkpoint.config, tuned_state=False)
    return AdapterBase(compute_identity(checkpoint), name or checkpoint.path.stem, config)


def check_base(adapters: tuple[Adapter, ...], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every adapter fits the checkpoint, and was trained on it or is for any base."""
    for adapter in adapters:
        _check_shapes(adapter, checkpoint)
    known = {adapter.base.identity for adapter in adapters if adapter.base and not adapter.any_base}
    if not known:
        return
    identity = compute_dense_identity(checkpoint)
    for adapter in adapters:
        theirs = adapter.base
        if theirs and not adapter.any_base and theirs.identity != identity:
            raise CheckpointError(
                f"{adapter.path} was trained on another model: {theirs.name} ({shorten_identity(theirs.identity)}...), "
                f"and {checkpoint.path} is {shorten_identity(identity)}...; give its own base, or "
                "--any-base to use it all the same"
            )


def _check_shapes(adapter: Adapter, checkpoint: Checkpoint) -> None:
    shapes = get_expected_shapes(replace(checkpoint.config, tuned_state=False))
    where = f"{adapter.path} does not fit {checkpoint.path}"
    for name, factors in adapter.factors.items():
        shape = shapes.get(f"{name}.weight")
        if shape is None:
            raise CheckpointError(f"{where}: it changes {name}, which this model does not have")
        have = (factors.up.shape[0], factors.down.shape[1])
        if have != shape:
            raise CheckpointError(f"{where}: it is for {name} of {have}, here that is {shape}")
    for name, tensor in adapter.full_parameters.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise CheckpointError(f"{where}: its {name} is {tuple(tensor.shape)}, here that is {shapes.get(name)}")
    if adapter.state:
        merge_tuned_state(checkpoint.config, {}, adapter.state, str(adapter.path))


def _agreed_alpha(given: float | None, recorded: float | None, source: str) -> float:
    if given is None and recorded is None:
        raise UsageError(
            f"{source} is a LoRA that does not record its alpha; give the one it was trained with, as --alpha 32 say"
        )
    if given is not None and recorded is not None and given != recorded:
        raise UsageError(f"alpha is {given:g}, but {source} was trained with {recorded:g}; leave --alpha out")
    alpha = recorded if given is None else given
    assert alpha is not None
    if not 0 < alpha < float("inf"):
        raise UsageError(f"alpha is {alpha:g}; it must be above 0")
    return float(alpha)


def _encode(adapter: Adapter) -> str:
    base = adapter.base
    record = {
        "format": FORMAT,
        "kind": adapter.kind,
        "alpha": adapter.alpha,
        "rank": adapter.rank,
        "targets": list(adapter.targets),
        "parts": sorted(adapter.full_parameters),
        "base": base and {"identity": base.identity, "name": base.name, "config": asdict(base.config)},
        "training": dict(adapter.training),
    }
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def _decode(text: str, source: str) -> dict[str, Any]:
    """The record, checked as far as it is used."""
    try:
        record = json.loads(text)
        number, kind, alpha = record["format"], record["kind"], record["alpha"]
        base, training = record["base"], record["training"]
        if number > FORMAT:
            raise UnsupportedError(f"{source} was written by a newer Fledge (adapter format {number}); update Fledge")
        sound = kind in KINDS and isinstance(alpha, int | float | None) and isinstance(training, dict)
        if base is not None:
            sound = sound and isinstance(base["identity"], str) and isinstance(base["name"], str)
            base = AdapterBase(base["identity"], base["name"], from_dict(ModelConfig, base["config"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{source}: the adapter record in its header is damaged: {error}") from error
    if not sound:
        raise CheckpointError(f"{source}: the adapter record in its header is damaged")
    return {"kind": kind, "alpha": alpha, "base": base, "training": training}
