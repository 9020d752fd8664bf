"""A hash that identifies the weights of a model, recorded in adapters as their base.

    SHA-256 over, for every tensor in the official order: "name (sizes)\\n", then the SHA-256 of each CHUNK of its
    values, little-endian, in the first of bfloat16, float16 and float32 that holds the whole chunk exactly

A model therefore has one identity in every format and in every dtype that keeps its values; 16-bit weights are hashed
as two bytes each. The tuned initial state is excluded, because the matrices of an adapter are not added to it. Rounded
weights have another identity. Every byte is read, on all cores, which takes seconds for a large model.
"""

from __future__ import annotations

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from fledge.checkpoint.record import Checkpoint
from fledge.checkpoint.shapes import get_expected_shapes

CHUNK = 1 << 22  # numbers
NARROW = (torch.bfloat16, torch.float16)


def compute_identity(checkpoint: Checkpoint) -> str:
    """Return 64 hex digits. Quantized matrices are hashed as the weights that they expand to."""
    assert sys.byteorder == "little", "the values are hashed in their memory layout"
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for name, shape in get_expected_shapes(replace(checkpoint.config, tuned_state=False)).items():
            tensor = checkpoint.tensors.get(name)
            if tensor is None:
                tensor = checkpoint.quantized[name].dequantize(torch.float32)
            digest.update(f"{name} {shape}\n".encode())
            for chunk_digest in pool.map(_digest, tensor.detach().reshape(-1).split(CHUNK)):
                digest.update(chunk_digest)
    return digest.hexdigest()


def _digest(chunk: Tensor) -> bytes:
    plain = chunk.cpu().contiguous()
    if plain.dtype not in NARROW:
        plain = plain.float()
    return hashlib.sha256(_narrow(plain).view(torch.uint8).numpy().data).digest()


def _narrow(plain: Tensor) -> Tensor:
    for dtype in NARROW:
        if plain.dtype == dtype:
            return plain
        narrow = plain.to(dtype)
        if torch.equal(narrow.to(plain.dtype), plain):
            return narrow
    return plain


def compute_dense_identity(checkpoint: Checkpoint) -> str:
    """Return the identity of the model that a quantized checkpoint was rounded from, or else that of the checkpoint."""
    facts = checkpoint.extra.get("quantised") if checkpoint.quantized else None
    base = facts.get("base") if isinstance(facts, dict) else None
    return base if isinstance(base, str) else compute_identity(checkpoint)


def shorten_identity(identity: str) -> str:
    """Return the first digits, for messages."""
    return identity[:12]
