"""Adapters for a loaded model: reading them, applying them without merging, and hashing what they change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

from fledge import checkpoint
from fledge.core.errors import UsageError
from fledge.models import BaseModel
from fledge.models.adapters import build_adapted_model

AdapterSource: TypeAlias = "checkpoint.Adapter | str | os.PathLike[str]"
"""An adapter file, or an adapter in memory (`fledge.checkpoint.read_adapter`)."""

AdapterSources: TypeAlias = "AdapterSource | Sequence[AdapterSource]"
"""One adapter, or several that are used together."""


def read_adapters(sources: AdapterSources) -> tuple[checkpoint.Adapter, ...]:
    """The adapters, read from their files where needed. Raises CheckpointError for a file that is not an adapter."""
    several = [sources] if isinstance(sources, checkpoint.Adapter | str | os.PathLike) else sources
    return tuple(
        source if isinstance(source, checkpoint.Adapter) else checkpoint.read_adapter(source) for source in several
    )


def adapt_model(model: nn.Module, changes: checkpoint.CombinedAdapter, name: str) -> nn.Module:
    """A model with these changes that shares the weights of `model`; `model` itself if no weight changes.

    Raises UsageError for a native model, which cannot apply unmerged adapters. `name` is the model's name in the error.
    """
    if not (changes.factors or changes.full_parameters):
        return model
    if not isinstance(model, BaseModel):
        raise UsageError(
            f"{name} uses the native library, which can apply a LoRA only while loading: load it with adapter=..., or "
            "with pack=False to switch between adapters on the same weights"
        )
    return build_adapted_model(model, changes.factors, changes.full_parameters).eval()


def hash_changes(changes: checkpoint.CombinedAdapter, previous: str = "") -> str:
    """SHA-256 of the changes to the weights, applied after those of `previous`; `previous` if no weight changes."""
    if not (changes.factors or changes.full_parameters):
        return previous
    digest = hashlib.sha256(previous.encode())
    tensors = dict(changes.full_parameters)
    for name, factors in changes.factors.items():
        tensors |= {f"{name} down": factors.down * factors.scale, f"{name} up": factors.up}
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
