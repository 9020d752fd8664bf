"""Adapters on a model that is loaded: LoRAs around its weights, a tuned state as what its texts begin from.

Here: what `fledge.load(adapter=...)` and `llm.adapted(...)` have in common. Not here: files, and the mathematics.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fledge import checkpoint
from fledge.core.errors import UsageError
from fledge.models import BaseModel
from fledge.models.adapters import adapted, start_state

if TYPE_CHECKING:
    from fledge.engine.llm.llm import LLM

One: TypeAlias = "checkpoint.Adapter | str | os.PathLike[str]"
Adapters: TypeAlias = "One | Sequence[One]"
"""A file, an adapter in memory (`fledge.checkpoint.read_adapter`), or several that are used together."""


def adapter_list(given: Adapters) -> tuple[checkpoint.Adapter, ...]:
    """The adapters, read from their files."""
    several = [given] if isinstance(given, checkpoint.Adapter | str | os.PathLike) else given
    return tuple(one if isinstance(one, checkpoint.Adapter) else checkpoint.read_adapter(one) for one in several)


def check_fit(adapters: tuple[checkpoint.Adapter, ...], llm: LLM) -> None:
    """Raise CheckpointError unless the adapters belong to the weights of `llm`: its file's, or those in memory."""
    checkpoint.check_base(adapters, weights_of(llm))


def weights_of(llm: LLM) -> checkpoint.Checkpoint:
    """What `llm` was made from: its file, or the weights in memory, of which a native or adapted model lacks some."""
    if llm.source:
        return checkpoint.read(llm.source)
    return checkpoint.Checkpoint(Path(llm.name), "", llm.config, llm.model.state_dict(), ())


def with_changes(llm: LLM, changes: checkpoint.CombinedAdapter) -> LLM:
    """`llm` with these changes, on the same weights. Raises UsageError where its model cannot have them unmerged."""
    if changes.template:
        llm = replace(llm, template=changes.template)
    if changes.state:
        llm = replace(llm, start=start_state(llm.config, changes.state))
    if not (changes.factors or changes.full_parameters):
        return llm
    llm = replace(llm, altered=fingerprint(changes, llm.altered))
    if not isinstance(llm.model, BaseModel):
        raise UsageError(
            f"{llm.name} runs natively, where a LoRA can only be merged while loading: load it with adapter=..., or "
            "with pack=False to switch between adapters on the same weights"
        )
    return replace(llm, model=adapted(llm.model, changes.factors, changes.full_parameters).eval())


def fingerprint(changes: checkpoint.CombinedAdapter, before: str = "") -> str:
    """A hash of how the weights change, after what changed them before; nothing where they do not."""
    if not (changes.factors or changes.full_parameters):
        return before
    digest = hashlib.sha256(before.encode())
    tensors = dict(changes.full_parameters)
    for name, factors in changes.factors.items():
        tensors |= {f"{name} down": factors.down * factors.scale, f"{name} up": factors.up}
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
