"""One GGUF file of a Finch: its tensors under official names, in official shapes and with nothing divided.

F32, F16, BF16 and F64 tensors are mapped from the file. Matrices in Q8_0, Q4_0 and Q4_1 become Fledge's int8 and int4
without loss. All other types are unpacked, and so is the embedding, of which a model looks up single rows. llama.cpp's
only RWKV with official tensors is RWKV-6; its other architectures are refused by name. Here: a whole file. Not here:
the header's bytes (gguf_header.py), types (gguf_blocks.py), names (gguf_names.py), the vocabulary (gguf_tokens.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
LARGEST_NOTE = 80  # characters of a key that is passed on as an extra

Found = tuple[dict[str, Tensor], dict[str, QuantizedMatrix]]


def read_gguf(path: Path, *, weights: bool = True) -> RawFile:
    """Tensors and quantized matrices under official names, with the config and the vocabulary of the file's keys.

    Without `weights` everything is on "meta" and only the header is read. Raises CheckpointError for a damaged file,
    UnsupportedError for other models and for types that cannot be unpacked.
    """
    header = read_header(path, _check_kind)
    config = _config(header, _tensors(header, None))
    stored = StoredMetadata(config, read_tokenizer_spec(header.values, config.vocab_size, str(path)), _extra(header))
    tensors, quantized = _tensors(header, _mapped(header) if weights else None)
    return RawFile(path, "gguf", tensors, (path,), stored, quantized=quantized)


def _check_kind(path: Path, values: dict[str, Any]) -> None:
    name = values.get("general.architecture")
    if name != ARCHITECTURE:
        what = "an RWKV-7 model" if name in ("rwkv7", "arwkv7") else f"a GGUF file of the architecture {name!r:.40}"
        raise UnsupportedError(
            f"{path} is {what}, which is not supported; of GGUF files Fledge runs RWKV-6 Finch ({ARCHITECTURE})"
        )
    if (parts := values.get("split.count", 1)) != 1:
        raise UnsupportedError(
            f"{path} is one of {parts!r:.40} files of a model; merge them with llama-gguf-split first"
        )


def _config(header: GgufHeader, found: Found) -> ModelConfig:
    """The sizes that the tensors show, held against those that the keys name, and the epsilon that only a key knows."""
    source = str(header.path)
    tensors, quantized = found
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
        if (told := header.values.get(f"{ARCHITECTURE}.{key}", size)) != size:
            raise CheckpointError(
                f"{source}: its key {ARCHITECTURE}.{key} says {told!r:.40}, its tensors say {size}; the file is damaged"
            )
    eps = header.values.get(f"{ARCHITECTURE}.attention.layer_norm_epsilon", config.norm_eps)
    try:
        # A float32 in the file: its shortest decimal is what was meant.
        with np.errstate(all="ignore"):
            return replace(config, norm_eps=float(str(np.float32(eps))))
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: layer_norm_epsilon is {eps!r:.40}, which cannot be; it is damaged") from error


def _extra(header: GgufHeader) -> dict[str, Any]:
    """What is worth showing and keeping of the rest: short texts, and the types of the tensors."""
    named = {"name": "general.name", "chat_template": "tokenizer.chat_template"}
    texts = {ours: header.values.get(key) for ours, key in named.items()}
    extra: dict[str, Any] = {
        ours: text
        for ours, text in texts.items()
        if isinstance(text, str) and 0 < len(text) <= LARGEST_NOTE and text.isprintable()
    }
    sizes: dict[str, int] = {}
    for place in header.locations.values():
        sizes[get_type_name(place.type)] = sizes.get(get_type_name(place.type), 0) + place.nbytes
    extra["gguf_types"] = ", ".join(sorted(sizes, key=lambda name: -sizes[name]))
    return extra


def _mapped(header: GgufHeader) -> Tensor:
    """All bytes of the file, private to this process: nothing is read before it is used."""
    try:
        return torch.from_file(str(header.path), shared=False, size=header.size, dtype=torch.uint8)
    except RuntimeError as error:
        raise CheckpointError(
            f"{header.path} cannot be mapped ({header.size / 1e9:.1f} GB); use a smaller model or a larger machine"
        ) from error


def _tensors(header: GgufHeader, mapped: Tensor | None) -> Found:
    """Dense tensors and quantized matrices under official names; on "meta" without the mapped file."""
    source = str(header.path)
    every, head_size = (_count(header, key) for key in ("rescale_every_n_layers", "wkv.head_size"))
    tensors: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedMatrix] = {}
    for name, place in header.locations.items():
        official = names.to_official_name(name)
        factor = names.get_rescale_factor(official, every, source)
        matrix = None
        if place.type in FORMATS and official != "emb.weight" and names.is_matrix(official):
            matrix = _matrix(place, mapped, factor)
        try:
            dense = None if matrix else _dense(place, mapped, factor, matrix=names.is_matrix(official))
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


def _matrix(place: TensorLocation, mapped: Tensor | None, factor: float) -> QuantizedMatrix | None:
    """A matrix in Fledge's own format, or None where that could not hold it exactly."""
    if mapped is None:
        form, rows, columns = FORMATS[place.type], math.prod(place.shape[:-1]), place.shape[-1]
        blocks = torch.empty(blocks_shape(form, rows, columns), dtype=torch.uint8, device="meta")
        return QuantizedMatrix(form, rows, columns, blocks)
    raw = _raw(place, mapped)
    matrix = unpack_quantized(raw, place.type, place.shape, factor)
    if matrix is not None:
        release_pages(raw)
    return matrix


def _dense(place: TensorLocation, mapped: Tensor | None, factor: float, *, matrix: bool) -> Tensor:
    """`factor` times a tensor, in the shape of the file."""
    dtype = PLAIN.get(place.type) or (torch.float16 if matrix else torch.float32)
    if mapped is None:
        return torch.empty(place.shape, dtype=dtype, device="meta")
    raw = _raw(place, mapped)
    if place.type not in PLAIN:
        dense = unpack_dense(raw, place.type, place.shape, factor, dtype)
        release_pages(raw)
        return dense
    if place.begin % dtype.itemsize:  # an alignment that ggml never uses
        raw = raw.clone()
    plain = raw.view(dtype).view(place.shape)
    if factor == 1:
        return plain
    scaled = plain * factor
    overflowed = bool((scaled.isinf() & plain.isfinite()).any())
    return plain.float() * factor if overflowed else scaled


def _raw(place: TensorLocation, mapped: Tensor) -> Tensor:
    return mapped[place.begin : place.begin + place.nbytes]


def _count(header: GgufHeader, key: str) -> int:
    """A number from the keys; 0 where it is missing."""
    found: Mapping[str, Any] = header.values
    value = found.get(f"{ARCHITECTURE}.{key}", 0)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{header.path}: {ARCHITECTURE}.{key} is {value!r:.40}, which is no count; it is damaged")
    return value
