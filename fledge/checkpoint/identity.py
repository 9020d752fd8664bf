"""Which weights a model has, in one number: what an adapter names as its base.

    SHA-256 over, for every tensor in the official order: "name (sizes)\\n", then its values as little-endian float32

float16 and bfloat16 widen to float32 without change, so a model has one identity in every format and dtype that keeps
its values. A tuned initial state is left out: it is not what an adapter's matrices are added to. Rounded weights are
other weights. Every byte is read, which takes seconds for a large model.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace

import torch
from torch import Tensor

from fledge.checkpoint.record import Checkpoint
from fledge.checkpoint.shapes import expected_shapes

PIECE = 1 << 22  # numbers that are widened at a time


def identity_of(checkpoint: Checkpoint) -> str:
    """64 hex digits. Quantised matrices count as what they expand to."""
    assert sys.byteorder == "little", "the values are hashed as they lie in memory"
    digest = hashlib.sha256()
    for name, shape in expected_shapes(replace(checkpoint.config, tuned_state=False)).items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            tensor = checkpoint.quantised[name].dequantise(torch.float32)
        digest.update(f"{name} {shape}\n".encode())
        _add(digest, tensor)
    return digest.hexdigest()


def dense_identity(checkpoint: Checkpoint) -> str:
    """The identity of the model that a quantised checkpoint was rounded from, where its file tells; else its own."""
    facts = checkpoint.extra.get("quantised") if checkpoint.quantised else None
    told = facts.get("base") if isinstance(facts, dict) else None
    return told if isinstance(told, str) else identity_of(checkpoint)


def _add(digest: hashlib._Hash, tensor: Tensor) -> None:
    for piece in tensor.detach().reshape(-1).split(PIECE):
        digest.update(piece.float().cpu().contiguous().numpy().data)


def short(identity: str) -> str:
    """The beginning, for people."""
    return identity[:12]
