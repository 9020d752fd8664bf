"""Adapter files of Fledge and RWKV-PEFT: LoRA factors, fully trained parameters and tuned initial states.

    .safetensors    with a record in the string map of the header under KEY: kind, alpha, rank, targets and base
    .pth            tensors only, as RWKV-PEFT and the state tuners of RWKV-LM write and read them, without alpha

Both use official names: `blocks.<i>.att.key.lora_A` (r, in) and `.lora_B` (out, r); a fully trained parameter has the
name of the parameter that it replaces; `blocks.<i>.att.time_state` is (H, V, K). An adapter works only with the weights
that it was trained on, so the identity of the base is compared before use.
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

    kind: str  # "lora" (optionally with fully trained parameters and a tuned state) or "state"
    tensors: Mapping[str, Tensor]
    alpha: float | None = (
        None  # of a LoRA; None for a tuned state, and in `inspect_adapter` if the file does not record it
    )
    base: AdapterBase | None = None  # a .pth does not record it
    path: Path = Path("adapter")
    training: Mapping[str, Any] = field(default_factory=dict)  # plain JSON: data, steps, rates
    any_base: bool = False  # allow use on other bases

    @property
    def factors(self) -> dict[str, LoraFactors]:
        """`blocks.<i>.att.key` -> its factors; empty for a tuned state."""
        names = {match[1] for name in self.tensors if (match := FACTOR.fullmatch(name))}
        return {
            name: self._get_factors(name) for name in sorted(names, key=lambda name: (int(name.split(".")[1]), name))
        }

    def _get_factors(self, name: str) -> LoraFactors:
        assert self.alpha is not None
        down, up = self.tensors[f"{name}.lora_A"], self.tensors[f"{name}.lora_B"]
        return LoraFactors(down, up, self.alpha / down.shape[0])

    @property
    def full_parameters(self) -> dict[str, Tensor]:
        """Fully trained parameters by name, without the tuned state."""
        return {n: t for n, t in self.tensors.items() if not (FACTOR.fullmatch(n) or STATE.fullmatch(n))}

    @property
    def state(self) -> dict[str, Tensor]:
        """`blocks.<i>.att.time_state` -> (H, V, K); empty without a tuned state."""
        return {name: tensor for name, tensor in self.tensors.items() if STATE.fullmatch(name)}

    @property
    def rank(self) -> int:
        """The largest rank of the factors; 0 without factors."""
        return max((tensor.shape[0] for name, tensor in self.tensors.items() if name.endswith(".lora_A")), default=0)

    @property
    def targets(self) -> tuple[str, ...]:
        """The fledge.models.adapters.TARGETS that have factors."""
        names = {match[2] for name in self.tensors if (match := FACTOR.fullmatch(name))}
        return tuple(target for target in TARGETS if target in names)

    @property
    def template(self) -> str | None:
        """The chat template that the adapter was trained with; None if the file does not record it."""
        template = self.training.get("template")
        return template if isinstance(template, str) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def allow_any_base(self) -> Adapter:
        """Return a copy that may be used on any base with matching shapes."""
        return replace(self, any_base=True)


def read_adapter(path: str | os.PathLike[str], *, alpha: float | None = None) -> Adapter:
    """Read an adapter; its kind is detected from the tensor names.

    alpha: of a LoRA whose file does not record it, as of RWKV-PEFT; a tuned state has none. Raises UsageError if alpha
    is required and missing, or differs from the recorded one; CheckpointError if the file holds no adapter or a
    damaged one.
    """
    path = locate(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the adapter's file")
    if detect_container(path) == "gguf":
        raise CheckpointError(f"{path} is a .gguf; adapters are read from .safetensors and .pth files")
    adapter = _parse_adapter(path, *_read_tensors(path))
    if adapter.kind != "lora":
        return adapter
    return replace(adapter, alpha=_choose_alpha(alpha, adapter.alpha, str(path)))


def read_adapters(files: Sequence[str], *, alpha: float | None = None, any_base: bool = False) -> list[Adapter]:
    """Read several adapters. any_base: allow their use on models that they were not trained on."""
    adapters = [read_adapter(file, alpha=alpha) for file in files]
    return [adapter.allow_any_base() for adapter in adapters] if any_base else adapters


def inspect_adapter(path: str | os.PathLike[str]) -> Adapter | None:
    """Read an adapter without its weights: the tensors are on "meta", and alpha is None if it is not recorded.

    Returns None if the file holds something else, such as a whole model. Raises CheckpointError for a damaged adapter.
    """
    path = locate(path)
    if path.is_dir() or detect_container(path) == "gguf":
        return None
    tensors, metadata = _read_tensors(path, weights=False)
    return _parse_adapter(path, tensors, metadata) if KEY in metadata or is_adapter(tensors) else None


def _read_tensors(path: Path, *, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors under the names in the file, and the string map of the header."""
    if detect_container(path) == "safetensors":
        return read_safetensors(path, weights=weights)
    return read_pth(path, weights=weights), {}


def _parse_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Build the adapter from the contents of a file, with the recorded alpha, if any."""
    record = _decode(metadata[KEY], str(path)) if KEY in metadata else {}
    tensors = strip_prefixes(tensors, str(path))
    kind = detect_kind(tensors, str(path))
    if record and record["kind"] != kind:
        raise CheckpointError(f"{path}: its header says {record['kind']}, its tensors are a {kind}; it is damaged")
    alpha = record.get("alpha") if kind == "lora" else None
    return Adapter(kind, tensors, alpha, record.get("base"), path, record.get("training", {}))


def save_adapter(path: str | os.PathLike[str], adapter: Adapter) -> tuple[str, ...]:
    """Write an adapter atomically; the suffix decides the format. Returns notes on what the format cannot hold."""
    path = Path(path)
    if path.suffix == ".safetensors":
        write_safetensors(path, adapter.tensors, {"format": "pt", KEY: _encode(adapter)})
        return ()
    if path.suffix != ".pth":
        raise UsageError(f"{path}: the suffix {path.suffix!r} is not an adapter format; use .safetensors or .pth")
    write_pth(path, adapter.tensors)
    notes = (
        [f"a .pth cannot hold alpha {adapter.alpha:g}; give it with --alpha when using the file"]
        if adapter.alpha
        else []
    )
    if adapter.template:
        notes.append(f"a .pth cannot hold the chat template; chat with --template {adapter.template}")
    return (*notes, "a .pth cannot hold the identity of the base")


def convert_adapter(
    adapter: Adapter, target: str | os.PathLike[str], *, base: Checkpoint | None = None, force: bool = False
) -> tuple[str, ...]:
    """Write an adapter in the format of the target's suffix. base: a fitting base to record.

    Raises CheckpointError if the target exists (unless `force`) or the adapter records another base.
    """
    target = Path(target)
    check_overwrite(target, force)
    if base is not None:
        check_base((adapter,), base)
        adapter = replace(adapter, base=describe_base(base))
    return save_adapter(target, adapter)


def describe_base(checkpoint: Checkpoint, name: str | None = None) -> AdapterBase:
    """Return the record of a base. Reads all its weights."""
    config = replace(checkpoint.config, tuned_state=False)
    return AdapterBase(compute_identity(checkpoint), name or checkpoint.path.stem, config)


def check_base(adapters: tuple[Adapter, ...], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every adapter fits the checkpoint, and was trained on it or allows any base."""
    for adapter in adapters:
        _check_shapes(adapter, checkpoint)
    if not any(adapter.base and not adapter.any_base for adapter in adapters):
        return
    identity = compute_dense_identity(checkpoint)
    for adapter in adapters:
        base = adapter.base
        if base and not adapter.any_base and base.identity != identity:
            raise CheckpointError(
                f"{adapter.path} was trained on another model: {base.name} ({shorten_identity(base.identity)}...), "
                f"and {checkpoint.path} is {shorten_identity(identity)}...; give its own base, or "
                "--any-base to use it anyway"
            )


def _check_shapes(adapter: Adapter, checkpoint: Checkpoint) -> None:
    shapes = get_expected_shapes(replace(checkpoint.config, tuned_state=False))
    mismatch = f"{adapter.path} does not fit {checkpoint.path}"
    for name, factors in adapter.factors.items():
        shape = shapes.get(f"{name}.weight")
        if shape is None:
            raise CheckpointError(f"{mismatch}: it changes {name}, which this model does not have")
        adapter_shape = (factors.up.shape[0], factors.down.shape[1])
        if adapter_shape != shape:
            raise CheckpointError(f"{mismatch}: it is for {name} of {adapter_shape}, here that is {shape}")
    for name, tensor in adapter.full_parameters.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise CheckpointError(f"{mismatch}: its {name} is {tuple(tensor.shape)}, here that is {shapes.get(name)}")
    if adapter.state:
        merge_tuned_state(checkpoint.config, {}, adapter.state, str(adapter.path))


def _choose_alpha(requested: float | None, recorded: float | None, source: str) -> float:
    if requested is None and recorded is None:
        raise UsageError(
            f"{source} is a LoRA that does not record its alpha; give the value of its training, such as --alpha 32"
        )
    if requested is not None and recorded is not None and requested != recorded:
        raise UsageError(f"alpha is {requested:g}, but {source} was trained with {recorded:g}; omit --alpha")
    alpha = recorded if requested is None else requested
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
    """Parse the record, and check the values that are used."""
    try:
        record = json.loads(text)
        number, kind, alpha = record["format"], record["kind"], record["alpha"]
        base, training = record["base"], record["training"]
        if number > FORMAT:
            raise UnsupportedError(f"{source} was written by a newer Fledge (adapter format {number}); update Fledge")
        is_valid = kind in KINDS and isinstance(alpha, int | float | None) and isinstance(training, dict)
        if base is not None:
            is_valid = is_valid and isinstance(base["identity"], str) and isinstance(base["name"], str)
            base = AdapterBase(base["identity"], base["name"], from_dict(ModelConfig, base["config"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{source}: the adapter record in its header is damaged: {error}") from error
    if not is_valid:
        raise CheckpointError(f"{source}: the adapter record in its header is damaged")
    return {"kind": kind, "alpha": alpha, "base": base, "training": training}
