"""Which weights a model has, in one number: what an adapter names as its base.

    SHA-256 over, for every tensor in the official order: "name (sizes)\\n", then the SHA-256 of each PIECE of its
    values, little-endian, in the first of bfloat16, float16 and float32 that holds the whole piece exactly

So a model has one identity in every format and in every dtype that keeps its values, and in 16 bits costs two bytes a
number. A tuned initial state is left out: it is not what an adapter's matrices are added to. Rounded weights are other
weights. Every byte is read, by all cores, which takes seconds for a large model.
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

PIECE = 1 << 22  # numbers
NARROW = (torch.bfloat16, torch.float16)


def compute_identity(checkpoint: Checkpoint) -> str:
    """64 hex digits. Quantized matrices count as what they expand to."""
    assert sys.byteorder == "little", "the values are hashed as they lie in memory"
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for name, shape in get_expected_shapes(replace(checkpoint.config, tuned_state=False)).items():
            tensor = checkpoint.tensors.get(name)
            if tensor is None:
                tensor = checkpoint.quantized[name].dequantize(torch.float32)
            digest.update(f"{name} {shape}\n".encode())
            for piece in pool.map(_digest, tensor.detach().reshape(-1).split(PIECE)):
                digest.update(piece)
    return digest.hexdigest()


def _digest(piece: Tensor) -> bytes:
    plain = piece.cpu().contiguous()
    if plain.dtype not in NARROW:
        plain = plain.float()
    return hashlib.sha256(_narrowest(plain).view(torch.uint8).numpy().data).digest()


def _narrowest(plain: Tensor) -> Tensor:
    for dtype in NARROW:
        if plain.dtype == dtype:
            return plain
        shorten_identity = plain.to(dtype)
        if torch.equal(shorten_identity.to(plain.dtype), plain):
            return shorten_identity
    return plain


def compute_dense_identity(checkpoint: Checkpoint) -> str:
    """The identity of the model that a quantized checkpoint was rounded from, where its file tells; else its own."""
    facts = checkpoint.extra.get("quantised") if checkpoint.quantized else None
    told = facts.get("base") if isinstance(facts, dict) else None
    return told if isinstance(told, str) else compute_identity(checkpoint)


def shorten_identity(identity: str) -> str:
    """The beginning, for people."""
    return identity[:12]
