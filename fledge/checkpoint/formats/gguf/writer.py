"""Writing a Finch as a GGUF file that llama.cpp loads: which type each tensor gets, the keys, and the file itself.

Always F32, as in llama.cpp's own files: norms, mixes, decays, the bonus and both LoRAs. The nine matrices have the type
that is asked for. The embedding stays at 16 bits where that type is quantized: a model looks up single rows of it, so
that quantizing it would save no time. Matrices that Fledge has quantized keep their integers: int8 is Q8_0 and int4 is
Q4_1, bit for bit. Rows that are no multiple of 32 long cannot be quantized and become F16.

Nothing is divided for the sake of float16: rescale_every_n_layers is 0. Tensors are made and written one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fledge.checkpoint.formats.gguf import names
from fledge.checkpoint.formats.gguf.blocks import (
    BF16,
    CHUNK,
    F16,
    F32,
    KEPT,
    get_block_size,
    get_type_name,
    import_gguf,
    pack_quantized,
)
from fledge.checkpoint.formats.gguf.names import OutputTensor
from fledge.checkpoint.formats.gguf.reader import ARCHITECTURE
from fledge.checkpoint.formats.gguf.vocabulary import make_tokenizer_keys
from fledge.checkpoint.record import Checkpoint
from fledge.checkpoint.shapes import get_expected_shapes
from fledge.checkpoint.writer import check_disk_space
from fledge.core.errors import CheckpointError, UnsupportedError, UsageError
from fledge.core.files import atomic_path
from fledge.models.config import ModelConfig
from fledge.tokenizer.vocabulary import WORLD_SIZE, Vocabulary, byte_vocabulary, world_vocabulary

# Type of the matrices -> (ggml's number of it, llama.cpp's number of a file of it).
TYPES = {
    "f32": (F32, 0),
    "f16": (F16, 1),
    "bf16": (BF16, 32),
    "q8_0": (8, 7),
    "q4_0": (2, 2),
    "q4_1": (3, 3),
    "q5_0": (6, 8),
    "q5_1": (7, 9),
}
FILE_TYPES = dict(TYPES.values())
BY_DTYPE = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.float64: F32}
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
CONTEXT_LENGTH = 1 << 20  # a nominal one, which llama.cpp wants to see
LARGEST_HALF = 65504.0
KNOWN_EXTRAS = {"name", "chat_template", "gguf_types"}  # of a GGUF file that was read; the new one has its own
QUANTIZATION_VERSION = 2  # of ggml's block formats

Bytes = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file: where it comes from, its type and its shape there."""

    outgoing: OutputTensor
    type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the file."""
        numbers, size = get_block_size(self.type)
        return int(np.prod(self.shape, dtype=np.int64)) // numbers * size


def write_gguf(checkpoint: Checkpoint, target: Path, kind: str | None = None) -> tuple[str, ...]:
    """Write a checkpoint of version 6.0 with matrices of the type `kind`, whole or not at all; gives notes for people.

    kind: one of TYPES; None keeps what the checkpoint has. Raises UnsupportedError for models that llama.cpp has no
    place for and where the gguf package is missing, CheckpointError for a full disk and numbers beyond a type's range.
    """
    if kind is not None and kind not in TYPES:
        raise UsageError(f"type {kind!r:.40} is unknown; use one of {', '.join(TYPES)}")
    _check_model(checkpoint)
    import_gguf()
    pieces, notes = _plan(checkpoint, TYPES[kind][0] if kind else None)
    vocabulary = _vocabulary(checkpoint)
    check_disk_space(
        target.parent, {"": torch.empty(sum(piece.nbytes for piece in pieces), dtype=torch.uint8, device="meta")}
    )
    _write(checkpoint, target, pieces, vocabulary)
    return (*notes, *_losses(checkpoint, vocabulary))


def _check_model(checkpoint: Checkpoint) -> None:
    config, source = checkpoint.config, checkpoint.path
    if config.version != "6.0":
        raise UnsupportedError(
            f"{source} is version {config.version}, and GGUF has a place for RWKV-6 (6.0) only, not for RWKV-4 and "
            "RWKV-5; use .safetensors or .pth"
        )
    if config.tuned_state:
        raise UnsupportedError(f"{source} has a tuned state, for which a GGUF has no place; use .safetensors")
    if config.dim_att != config.n_embd:
        raise UnsupportedError(
            f"{source} has width {config.n_embd} and attention width {config.dim_att}; llama.cpp wants them the same"
        )


def _plan(checkpoint: Checkpoint, wanted: int | None) -> tuple[list[PlannedTensor], list[str]]:
    """What the file will hold, in order, and what is to be said about it."""
    usual = wanted if wanted is not None else _usual_type(checkpoint)
    pieces, short, again = [], [], []
    for outgoing in names.plan_output_tensors(get_expected_shapes(checkpoint.config)):
        name = outgoing.sources[0]
        matrix = checkpoint.quantized.get(name)
        shape = matrix.shape if matrix else _shape(outgoing, checkpoint.tensors)
        kind = _type(checkpoint, name, usual)
        if matrix and wanted in (None, KEPT[matrix.format]):
            kind = KEPT[matrix.format]
        if kind not in DTYPES and shape[-1] % get_block_size(kind)[0]:
            kind = F16
            short.append(outgoing.name)
        if matrix and kind not in (*DTYPES, KEPT[matrix.format]):
            again.append(outgoing.name)
        pieces.append(PlannedTensor(outgoing, kind, shape))
    notes = []
    if short:
        notes.append(f"{len(short)} matrices became F16, {short[0]} say: their rows are no multiple of 32 long")
    if again:
        notes.append(f"{len(again)} matrices were quantized a second time; give the original for a better result")
    return pieces, notes


def _type(checkpoint: Checkpoint, name: str, usual: int) -> int:
    """The type of a tensor, given that of the matrices."""
    if not names.is_matrix(name):
        return F32
    if usual not in DTYPES and name == "emb.weight":
        dense = checkpoint.tensors.get(name)
        return BF16 if dense is not None and dense.dtype == torch.bfloat16 else F16
    return usual


def _usual_type(checkpoint: Checkpoint) -> int:
    """The plain type of most numbers in the dense matrices."""
    sizes: Counter[int] = Counter()
    for name, tensor in checkpoint.tensors.items():
        if names.is_matrix(name):
            sizes[BY_DTYPE[tensor.dtype]] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else F16


def _shape(outgoing: OutputTensor, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    metas = {name: torch.empty_like(tensors[name], device="meta") for name in outgoing.sources}
    return tuple(names.to_gguf(outgoing, metas).shape)


def _vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The recorded vocabulary, or the one that models with so many rows use."""
    if checkpoint.tokenizer_spec is not None:
        return Vocabulary.from_spec(checkpoint.tokenizer_spec)
    usual = {WORLD_SIZE: world_vocabulary, 256: byte_vocabulary}.get(checkpoint.config.vocab_size)
    return usual() if usual else None


def _losses(checkpoint: Checkpoint, vocabulary: Vocabulary | None) -> list[str]:
    config, notes = checkpoint.config, []
    if config.group_norm_eps != ModelConfig.group_norm_eps:
        notes.append(f"llama.cpp uses group_norm_eps 64e-5 always; this model has {config.group_norm_eps}")
    if vocabulary is None:
        notes.append("no vocabulary is known for this model; llama.cpp will take token ids only")
    if checkpoint.extra.keys() - KNOWN_EXTRAS:
        notes.append("a .gguf cannot hold the extras; they were left out")
    return notes


def _keys(
    checkpoint: Checkpoint, pieces: list[PlannedTensor], vocabulary: Vocabulary | None, name: str
) -> dict[str, Any]:
    """Key -> int (written as uint32), float (as float32), text or list."""
    config = checkpoint.config
    sizes: Counter[int] = Counter()
    for piece in pieces:
        if names.is_matrix(piece.outgoing.sources[0]):
            sizes[piece.type] += piece.nbytes
    model: dict[str, Any] = {
        "context_length": CONTEXT_LENGTH,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.dim_ffn,
        "attention.head_count": 0,  # wanted, and not used
        "attention.layer_norm_epsilon": float(config.norm_eps),
        "rescale_every_n_layers": 0,
        "wkv.head_size": config.head_size,
        "time_mix_extra_dim": config.mix_rank,
        "time_decay_extra_dim": config.decay_rank,
        "vocab_size": config.vocab_size,
    }
    tokenizer = make_tokenizer_keys(vocabulary, config.vocab_size)
    named = checkpoint.extra.get("name")
    keys: dict[str, Any] = {
        "general.type": "model",
        "general.name": named if isinstance(named, str) else name,
        "general.file_type": FILE_TYPES[sizes.most_common(1)[0][0]],
        **{f"{ARCHITECTURE}.{key}": value for key, value in model.items()},
        **{f"tokenizer.{key}": value for key, value in tokenizer.items()},
    }
    if any(piece.type not in DTYPES for piece in pieces):
        keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys


def _write(checkpoint: Checkpoint, target: Path, pieces: list[PlannedTensor], vocabulary: Vocabulary | None) -> None:
    gguf = import_gguf()
    with atomic_path(target) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            for key, value in _keys(checkpoint, pieces, vocabulary, target.stem).items():
                add = {
                    int: writer.add_uint32,
                    float: writer.add_float32,
                    str: writer.add_string,
                    list: writer.add_array,
                }
                add[type(value)](key, value)
            for piece in pieces:
                kind = gguf.GGMLQuantizationType(piece.type)
                writer.add_tensor_info(piece.outgoing.name, piece.shape, np.dtype(np.float32), piece.nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for piece in pieces:
                writer.write_tensor_data(_bytes(checkpoint, piece))
        finally:
            writer.close()


def _bytes(checkpoint: Checkpoint, piece: PlannedTensor) -> Bytes:
    """One tensor as the file holds it."""
    name = piece.outgoing.sources[0]
    matrix = checkpoint.quantized.get(name)
    if matrix and piece.type == KEPT[matrix.format]:
        return pack_quantized(matrix)
    tensor = matrix.dequantize() if matrix else names.to_gguf(piece.outgoing, checkpoint.tensors)
    if piece.type not in (F32, BF16) and bool((tensor.abs() > LARGEST_HALF).any()):
        raise CheckpointError(
            f"{checkpoint.path}: {name} is too large for {get_type_name(piece.type)}; use f32 or bf16"
        )
    if piece.type in DTYPES:
        return tensor.to(DTYPES[piece.type]).contiguous().view(torch.uint8).numpy()
    return _quantized(tensor, piece.type)


def _quantized(tensor: Tensor, kind: int) -> Bytes:
    """A matrix as bytes of a quantized type, made some rows at a time: on the way they are float32."""
    gguf = import_gguf()
    rows, columns = tensor.shape
    numbers, size = get_block_size(kind)
    step = max(1, CHUNK // columns)
    packed = np.empty((rows, columns // numbers * size), dtype=np.uint8)
    for first in range(0, rows, step):
        wide = tensor[first : first + step].float().numpy()
        with np.errstate(all="ignore"):  # numbers that are not finite stay so
            packed[first : first + step] = gguf.quants.quantize(wide, gguf.GGMLQuantizationType(kind))
    return packed
