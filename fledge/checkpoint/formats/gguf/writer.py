"""Write a Finch as a GGUF file for llama.cpp.

As in the files of llama.cpp, norms, mixes, decays, the bonus and both LoRAs are always F32. The nine matrices have the
requested type. If that type is quantized, the embedding stays at 16 bits: a model looks up single rows of it, so that
quantizing it would save no time. Matrices that Fledge has quantized keep their integers: int8 is Q8_0 and int4 is Q4_1,
bit for bit. Matrices whose row length is not a multiple of 32 cannot be quantized and become F16.

No tensor is divided for float16: rescale_every_n_layers is 0. Tensors are converted and written one at a time.
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
    EXACT_TYPES,
    F16,
    F32,
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

# Type of the matrices -> (its number in ggml, the number of the file type in llama.cpp).
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
CONTEXT_LENGTH = 1 << 20  # a nominal value, which llama.cpp requires
MAX_FLOAT16 = 65504.0
KNOWN_EXTRAS = {"name", "chat_template", "gguf_types"}  # of a GGUF file that was read; the new file has its own
QUANTIZATION_VERSION = 2  # of ggml's block formats

Bytes = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file: its name and sources, its type and its shape."""

    output: OutputTensor
    type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        numbers, size = get_block_size(self.type)
        return int(np.prod(self.shape, dtype=np.int64)) // numbers * size


def write_gguf(checkpoint: Checkpoint, target: Path, kind: str | None = None) -> tuple[str, ...]:
    """Write a checkpoint of version 6.0 atomically, with matrices of the type `kind`. Returns notes for the user.

    kind: one of TYPES; None keeps the types of the checkpoint. Raises UnsupportedError for models that llama.cpp does
    not support and if the gguf package is missing, CheckpointError for a full disk and for numbers out of range.
    """
    if kind is not None and kind not in TYPES:
        raise UsageError(f"type {kind!r:.40} is unknown; use one of {', '.join(TYPES)}")
    _check_model(checkpoint)
    import_gguf()
    tensors, notes = _plan_tensors(checkpoint, TYPES[kind][0] if kind else None)
    vocabulary = _choose_vocabulary(checkpoint)
    check_disk_space(
        target.parent, {"": torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device="meta")}
    )
    _write(checkpoint, target, tensors, vocabulary)
    return (*notes, *_list_losses(checkpoint, vocabulary))


def _check_model(checkpoint: Checkpoint) -> None:
    config, source = checkpoint.config, checkpoint.path
    if config.version != "6.0":
        raise UnsupportedError(
            f"{source} is version {config.version}, and GGUF supports only RWKV-6 (6.0), not RWKV-4 and "
            "RWKV-5; use .safetensors or .pth"
        )
    if config.tuned_state:
        raise UnsupportedError(f"{source} has a tuned state, which a GGUF cannot hold; use .safetensors")
    if config.dim_att != config.n_embd:
        raise UnsupportedError(
            f"{source} has width {config.n_embd} and attention width {config.dim_att}; llama.cpp requires "
            "them to be equal"
        )


def _plan_tensors(checkpoint: Checkpoint, requested: int | None) -> tuple[list[PlannedTensor], list[str]]:
    """Return the tensors of the file, in order, and notes for the user."""
    matrix_type = requested if requested is not None else _get_common_type(checkpoint)
    tensors, short, requantized = [], [], []
    for output in names.plan_output_tensors(get_expected_shapes(checkpoint.config)):
        name = output.sources[0]
        matrix = checkpoint.quantized.get(name)
        shape = matrix.shape if matrix else _get_shape(output, checkpoint.tensors)
        kind = _choose_type(checkpoint, name, matrix_type)
        if matrix and requested in (None, EXACT_TYPES[matrix.format]):
            kind = EXACT_TYPES[matrix.format]
        if kind not in DTYPES and shape[-1] % get_block_size(kind)[0]:
            kind = F16
            short.append(output.name)
        if matrix and kind not in (*DTYPES, EXACT_TYPES[matrix.format]):
            requantized.append(output.name)
        tensors.append(PlannedTensor(output, kind, shape))
    notes = []
    if short:
        notes.append(f"{len(short)} matrices became F16, such as {short[0]}: their row length is not a multiple of 32")
    if requantized:
        notes.append(f"{len(requantized)} matrices were quantized a second time; give the original for a better result")
    return tensors, notes


def _choose_type(checkpoint: Checkpoint, name: str, matrix_type: int) -> int:
    """Return the type of a tensor, given that of the matrices."""
    if not names.is_matrix(name):
        return F32
    if matrix_type not in DTYPES and name == "emb.weight":
        dense = checkpoint.tensors.get(name)
        return BF16 if dense is not None and dense.dtype == torch.bfloat16 else F16
    return matrix_type


def _get_common_type(checkpoint: Checkpoint) -> int:
    """Return the plain type of most numbers in the dense matrices."""
    sizes: Counter[int] = Counter()
    for name, tensor in checkpoint.tensors.items():
        if names.is_matrix(name):
            sizes[BY_DTYPE[tensor.dtype]] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else F16


def _get_shape(output: OutputTensor, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    metas = {name: torch.empty_like(tensors[name], device="meta") for name in output.sources}
    return tuple(names.to_gguf(output, metas).shape)


def _choose_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """Return the recorded vocabulary, or the usual one of models with this number of rows."""
    if checkpoint.tokenizer_spec is not None:
        return Vocabulary.from_spec(checkpoint.tokenizer_spec)
    make = {WORLD_SIZE: world_vocabulary, 256: byte_vocabulary}.get(checkpoint.config.vocab_size)
    return make() if make else None


def _list_losses(checkpoint: Checkpoint, vocabulary: Vocabulary | None) -> list[str]:
    config, notes = checkpoint.config, []
    if config.group_norm_eps != ModelConfig.group_norm_eps:
        notes.append(f"llama.cpp always uses group_norm_eps 64e-5; this model has {config.group_norm_eps}")
    if vocabulary is None:
        notes.append("no vocabulary is known for this model; llama.cpp will take token ids only")
    if checkpoint.extra.keys() - KNOWN_EXTRAS:
        notes.append("a .gguf cannot hold the extras; they were left out")
    return notes


def _make_keys(
    checkpoint: Checkpoint, tensors: list[PlannedTensor], vocabulary: Vocabulary | None, name: str
) -> dict[str, Any]:
    """Return key -> int (written as uint32), float (as float32), text or list."""
    config = checkpoint.config
    sizes: Counter[int] = Counter()
    for tensor in tensors:
        if names.is_matrix(tensor.output.sources[0]):
            sizes[tensor.type] += tensor.nbytes
    model: dict[str, Any] = {
        "context_length": CONTEXT_LENGTH,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.dim_ffn,
        "attention.head_count": 0,  # required, but not used
        "attention.layer_norm_epsilon": float(config.norm_eps),
        "rescale_every_n_layers": 0,
        "wkv.head_size": config.head_size,
        "time_mix_extra_dim": config.mix_rank,
        "time_decay_extra_dim": config.decay_rank,
        "vocab_size": config.vocab_size,
    }
    tokenizer = make_tokenizer_keys(vocabulary, config.vocab_size)
    model_name = checkpoint.extra.get("name")
    keys: dict[str, Any] = {
        "general.type": "model",
        "general.name": model_name if isinstance(model_name, str) else name,
        "general.file_type": FILE_TYPES[sizes.most_common(1)[0][0]],
        **{f"{ARCHITECTURE}.{key}": value for key, value in model.items()},
        **{f"tokenizer.{key}": value for key, value in tokenizer.items()},
    }
    if any(tensor.type not in DTYPES for tensor in tensors):
        keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys


def _write(checkpoint: Checkpoint, target: Path, tensors: list[PlannedTensor], vocabulary: Vocabulary | None) -> None:
    gguf = import_gguf()
    with atomic_path(target) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            for key, value in _make_keys(checkpoint, tensors, vocabulary, target.stem).items():
                add = {
                    int: writer.add_uint32,
                    float: writer.add_float32,
                    str: writer.add_string,
                    list: writer.add_array,
                }
                add[type(value)](key, value)
            for tensor in tensors:
                kind = gguf.GGMLQuantizationType(tensor.type)
                writer.add_tensor_info(tensor.output.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_encode_tensor(checkpoint, tensor))
        finally:
            writer.close()


def _encode_tensor(checkpoint: Checkpoint, planned: PlannedTensor) -> Bytes:
    """Return one tensor as it is in the file."""
    name = planned.output.sources[0]
    matrix = checkpoint.quantized.get(name)
    if matrix and planned.type == EXACT_TYPES[matrix.format]:
        return pack_quantized(matrix)
    tensor = matrix.dequantize() if matrix else names.to_gguf(planned.output, checkpoint.tensors)
    if planned.type not in (F32, BF16) and bool((tensor.abs() > MAX_FLOAT16).any()):
        raise CheckpointError(
            f"{checkpoint.path}: {name} is too large for {get_type_name(planned.type)}; use f32 or bf16"
        )
    if planned.type in DTYPES:
        return tensor.to(DTYPES[planned.type]).contiguous().view(torch.uint8).numpy()
    return _quantize(tensor, planned.type)


def _quantize(tensor: Tensor, kind: int) -> Bytes:
    """Return a matrix as bytes of a quantized type. It is converted to float32 some rows at a time."""
    gguf = import_gguf()
    rows, columns = tensor.shape
    numbers, size = get_block_size(kind)
    step = max(1, CHUNK // columns)
    packed = np.empty((rows, columns // numbers * size), dtype=np.uint8)
    for first in range(0, rows, step):
        wide = tensor[first : first + step].float().numpy()
        with np.errstate(all="ignore"):  # numbers that are not finite stay not finite
            packed[first : first + step] = gguf.quants.quantize(wide, gguf.GGMLQuantizationType(kind))
    return packed
