"""Read a GGUF file of a Finch, with official names and shapes and without rescaling.

F32, F16, BF16 and F64 tensors are mapped from the file. Matrices in Q8_0, Q4_0 and Q4_1 become Fledge's int8 and int4
without loss. All other types are unpacked, and so is the embedding, because a model looks up single rows of it. RWKV-6
is the only RWKV of llama.cpp with official tensors; other architectures are refused by name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fledge.checkpoint.detection import detect
from fledge.checkpoint.formats.gguf import names
from fledge.checkpoint.formats.gguf.blocks import FORMATS, PLAIN, get_type_name, unpack_dense, unpack_quantized
from fledge.checkpoint.formats.gguf.header import GgufHeader, TensorLocation, read_header
from fledge.checkpoint.formats.gguf.vocabulary import read_tokenizer_spec
from fledge.checkpoint.mapped_memory import release_pages
from fledge.checkpoint.record import RawFile, StoredMetadata
from fledge.checkpoint.shapes import Shape
from fledge.core.errors import CheckpointError, ConfigError, UnsupportedError
from fledge.kernels.quantized import QuantizedMatrix, blocks_shape
from fledge.models.config import ModelConfig

ARCHITECTURE = "rwkv6"
MAX_NOTE = 80  # characters of a key that is kept as an extra

Contents = tuple[dict[str, Tensor], dict[str, QuantizedMatrix]]


def read_gguf(path: Path, *, weights: bool = True) -> RawFile:
    """Read tensors and quantized matrices under official names, and the config and vocabulary from the keys.

    Without `weights` everything is on "meta" and only the header is read. Raises CheckpointError for a damaged file,
    UnsupportedError for other models and for types that cannot be unpacked.
    """
    header = read_header(path, _check_architecture)
    config = _read_config(header, _read_tensors(header, None))
    stored = StoredMetadata(
        config, read_tokenizer_spec(header.values, config.vocab_size, str(path)), _read_extra(header)
    )
    tensors, quantized = _read_tensors(header, _map_file(header) if weights else None)
    return RawFile(path, "gguf", tensors, (path,), stored, quantized=quantized)


def _check_architecture(path: Path, values: dict[str, Any]) -> None:
    name = values.get("general.architecture")
    if name != ARCHITECTURE:
        description = (
            "an RWKV-7 model" if name in ("rwkv7", "arwkv7") else f"a GGUF file of the architecture {name!r:.40}"
        )
        raise UnsupportedError(
            f"{path} is {description}, which is not supported; of GGUF files Fledge runs RWKV-6 Finch ({ARCHITECTURE})"
        )
    if (parts := values.get("split.count", 1)) != 1:
        raise UnsupportedError(
            f"{path} is one of {parts!r:.40} files of a model; merge them with llama-gguf-split first"
        )


def _read_config(header: GgufHeader, contents: Contents) -> ModelConfig:
    """Detect the sizes from the tensors, check them against the keys, and take the epsilon from its key."""
    source = str(header.path)
    tensors, quantized = contents
    shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = detect(shapes | {name: matrix.shape for name, matrix in quantized.items()}, source)
    if config.version != "6.0":
        raise CheckpointError(f"{source} says it is {ARCHITECTURE}, but its tensors are of version {config.version}")
    sizes = {
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.dim_ffn,
        "wkv.head_size": config.head_size,
    }
    for key, size in sizes.items():
        if (claimed := header.values.get(f"{ARCHITECTURE}.{key}", size)) != size:
            raise CheckpointError(
                f"{source}: its key {ARCHITECTURE}.{key} says {claimed!r:.40}, its tensors say {size}; the file is "
                "damaged"
            )
    eps = header.values.get(f"{ARCHITECTURE}.attention.layer_norm_epsilon", config.norm_eps)
    try:
        # It is a float32 in the file; its shortest decimal is the original number.
        with np.errstate(all="ignore"):
            return replace(config, norm_eps=float(str(np.float32(eps))))
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: layer_norm_epsilon is {eps!r:.40}, which is impossible; it is damaged"
        ) from error


def _read_extra(header: GgufHeader) -> dict[str, Any]:
    """Collect other facts: short texts, and the types of the tensors."""
    keys = {"name": "general.name", "chat_template": "tokenizer.chat_template"}
    texts = {name: header.values.get(key) for name, key in keys.items()}
    extra: dict[str, Any] = {
        name: text
        for name, text in texts.items()
        if isinstance(text, str) and 0 < len(text) <= MAX_NOTE and text.isprintable()
    }
    sizes: dict[str, int] = {}
    for location in header.locations.values():
        sizes[get_type_name(location.type)] = sizes.get(get_type_name(location.type), 0) + location.nbytes
    extra["gguf_types"] = ", ".join(sorted(sizes, key=lambda name: -sizes[name]))
    return extra


def _map_file(header: GgufHeader) -> Tensor:
    """Map all bytes of the file, private to this process; nothing is read before it is used."""
    try:
        return torch.from_file(str(header.path), shared=False, size=header.size, dtype=torch.uint8)
    except RuntimeError as error:
        raise CheckpointError(
            f"{header.path} cannot be mapped ({header.size / 1e9:.1f} GB); use a smaller model or a larger machine"
        ) from error


def _read_tensors(header: GgufHeader, mapped: Tensor | None) -> Contents:
    """Return dense tensors and quantized matrices under official names, on "meta" without the mapped file."""
    source = str(header.path)
    every, head_size = (_get_count(header, key) for key in ("rescale_every_n_layers", "wkv.head_size"))
    tensors: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedMatrix] = {}
    for name, location in header.locations.items():
        official = names.to_official_name(name)
        factor = names.get_rescale_factor(official, every, source)
        matrix = None
        if location.type in FORMATS and official != "emb.weight" and names.is_matrix(official):
            matrix = _read_matrix(location, mapped, factor)
        try:
            dense = None if matrix else _read_dense(location, mapped, factor, matrix=names.is_matrix(official))
            parts = {} if dense is None else names.from_gguf(name, dense, head_size)
        except CheckpointError as error:
            raise type(error)(f"{source}: {error}") from error
        repeated = ({official} if matrix else parts.keys()) & (tensors.keys() | quantized.keys())
        if repeated:
            raise CheckpointError(f"{source} holds {min(repeated)!r:.80} twice, under several names; it is damaged")
        tensors |= parts
        if matrix:
            quantized[official] = matrix
    return tensors, quantized


def _read_matrix(location: TensorLocation, mapped: Tensor | None, factor: float) -> QuantizedMatrix | None:
    """Return a matrix in the format of Fledge, or None if that cannot hold it exactly."""
    if mapped is None:
        format, rows, columns = FORMATS[location.type], math.prod(location.shape[:-1]), location.shape[-1]
        blocks = torch.empty(blocks_shape(format, rows, columns), dtype=torch.uint8, device="meta")
        return QuantizedMatrix(format, rows, columns, blocks)
    raw = _get_bytes(location, mapped)
    matrix = unpack_quantized(raw, location.type, location.shape, factor)
    if matrix is not None:
        release_pages(raw)
    return matrix


def _read_dense(location: TensorLocation, mapped: Tensor | None, factor: float, *, matrix: bool) -> Tensor:
    """Return `factor` times a tensor, in the shape of the file."""
    dtype = PLAIN.get(location.type) or (torch.float16 if matrix else torch.float32)
    if mapped is None:
        return torch.empty(location.shape, dtype=dtype, device="meta")
    raw = _get_bytes(location, mapped)
    if location.type not in PLAIN:
        dense = unpack_dense(raw, location.type, location.shape, factor, dtype)
        release_pages(raw)
        return dense
    if location.begin % dtype.itemsize:  # an alignment that ggml does not use
        raw = raw.clone()
    plain = raw.view(dtype).view(location.shape)
    if factor == 1:
        return plain
    scaled = plain * factor
    overflowed = bool((scaled.isinf() & plain.isfinite()).any())
    return plain.float() * factor if overflowed else scaled


def _get_bytes(location: TensorLocation, mapped: Tensor) -> Tensor:
    return mapped[location.begin : location.begin + location.nbytes]


def _get_count(header: GgufHeader, key: str) -> int:
    """Return an integer from the keys; 0 if it is missing."""
    value = header.values.get(f"{ARCHITECTURE}.{key}", 0)
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"{header.path}: {ARCHITECTURE}.{key} is {value!r:.40}, which is not a count; it is damaged"
        )
    return value
