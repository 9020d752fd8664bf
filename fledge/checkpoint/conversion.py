"""Conversion between formats. Values and dtypes are unchanged, unless a matrix type is requested.

    .pth            the official layout, for other RWKV programs; tensors only
    .safetensors    Fledge's own: official names, with config and tokenizer in the header
    .gguf           for llama.cpp (RWKV-6 only); the only format with a choice of quantized types
    folder, "hf"    Hugging Face remote code (RWKV-5 5.2 and RWKV-6), transformers' own class (RWKV-4)
    folder, "fla"   flash-linear-attention (RWKV-6 only)

Targets are written atomically. Quantized matrices stay quantized in .safetensors and .gguf; other formats cannot hold
them.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.checkpoint import metadata
from fledge.checkpoint.formats.fla import to_fla
from fledge.checkpoint.formats.gguf.writer import write_gguf
from fledge.checkpoint.formats.huggingface.folder import MODEL_TYPES
from fledge.checkpoint.formats.huggingface.names import to_hf
from fledge.checkpoint.formats.huggingface.settings import FLA_NOTES, list_hf_notes, make_fla_config, make_hf_config
from fledge.checkpoint.formats.safetensors import write_safetensors
from fledge.checkpoint.reader import read, verify_files
from fledge.checkpoint.record import Checkpoint, StoredMetadata
from fledge.checkpoint.writer import check_disk_space, check_overwrite, save
from fledge.core.errors import CheckpointError, UnsupportedError, UsageError
from fledge.core.files import atomic_path

FILES = ("pth", "safetensors", "gguf")
FORMATS = (*FILES, "hf", "fla")
DENSE_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_EPS = 64e-5
# Suffixes of other file formats: the user did not mean a folder. Other suffixes are allowed, as in the folder v1.5.
FILE_SUFFIXES = (
    *(".pth", ".safetensors", ".gguf"),  # in capitals, as readers accept only lower case
    *(".pt", ".bin", ".ckpt", ".ggml", ".onnx", ".h5", ".npz", ".npy", ".msgpack", ".mlmodel", ".tflite"),
    *(".pkl", ".pickle", ".json", ".txt", ".zip", ".tar", ".gz", ".tgz", ".7z", ".xz", ".zst"),
)
MODEL_FILES = re.compile(r"config\.json|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion."""

    source: Path
    target: Path
    format: str
    nbytes: int
    notes: tuple[str, ...]  # sentences for the user: what the target cannot hold, what its program needs


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    matrix_type: str | None = None,
    force: bool = False,
) -> ConversionReport:
    """Write the checkpoint `source` as `target`, in the format `to`; by default the suffix decides (a folder is "hf").

    The checksums of a .pth are verified. An existing target is an error unless `force`; a folder is replaced only if it
    contains nothing but a model. matrix_type: the type of the written matrices (DENSE_TYPES, also for the embedding;
    formats.gguf.writer.TYPES for a .gguf); None keeps them. Raises CheckpointError, UnsupportedError if the format
    cannot hold the version or the type cannot hold a value, UsageError for an unknown format or suffix.
    """
    target = Path(target)
    kind = to or _choose_format(target)
    if kind not in FORMATS:
        raise UsageError(f"format {kind!r} is unknown; use one of {', '.join(FORMATS)}")
    if kind in FILES and target.suffix != f".{kind}":
        raise UsageError(f"{target}: a {kind} file must be named *.{kind}")
    if matrix_type is not None and kind != "gguf" and matrix_type not in DENSE_TYPES:
        dense = ", ".join(DENSE_TYPES)
        raise UsageError(f"type {matrix_type!r:.40} is only for a .gguf; for {kind} choose from {dense}")
    _check_target(target, kind, force)
    checkpoint = read(source)
    _check_format(checkpoint, kind)
    verify_files(checkpoint)
    if kind == "gguf":
        notes = write_gguf(checkpoint, target, matrix_type)
    else:
        checkpoint = checkpoint if matrix_type is None else _convert_matrices(checkpoint, DENSE_TYPES[matrix_type])
        checkpoint, unpack_notes = (checkpoint, ()) if kind == "safetensors" else _dequantize(checkpoint)
        check_disk_space(target.parent, checkpoint.tensors)
        write = _write_file if kind in FILES else _write_folder
        notes = (*write(checkpoint, target, kind), *unpack_notes)
    files = [target] if target.is_file() else list(target.iterdir())
    return ConversionReport(checkpoint.path, target, kind, sum(file.stat().st_size for file in files), notes)


def _choose_format(target: Path) -> str:
    """Return the format that the name of the target implies."""
    if target.suffix.removeprefix(".") in FILES:
        return target.suffix.removeprefix(".")
    if target.suffix.lower() in FILE_SUFFIXES:
        raise UsageError(
            f"{target}: the suffix {target.suffix!r} is not a format that can be written; name a *.pth, *.safetensors "
            "or *.gguf file, or a folder without such a suffix (format hf, or fla if requested)"
        )
    similar = difflib.get_close_matches(target.suffix.lower(), [f".{kind}" for kind in FILES], n=1, cutoff=0.8)
    if similar and not target.is_dir():
        raise UsageError(f"{target}: did you mean {target.with_suffix(similar[0])}?")
    return "hf"


def _check_target(target: Path, kind: str, force: bool) -> None:
    folder = kind in ("hf", "fla")
    if not target.exists() or (folder and target.is_dir() and not any(target.iterdir())):
        return
    check_overwrite(target, force)
    if target.is_dir() != folder:
        raise CheckpointError(
            f"{target} is a {'folder' if target.is_dir() else 'file'}, but a {kind} checkpoint is not"
        )
    other_files = (
        [entry.name for entry in target.iterdir() if not MODEL_FILES.fullmatch(entry.name)] if target.is_dir() else []
    )
    if other_files:
        raise CheckpointError(
            f"{target} holds more than a model ({min(other_files)}) and will not be replaced; give another name"
        )


def _check_format(checkpoint: Checkpoint, kind: str) -> None:
    config, source = checkpoint.config, checkpoint.path
    if config.version == "llama" and kind != "safetensors":
        raise UnsupportedError(f"{source} is a transformer, which only a .safetensors can hold, not a {kind}")
    versions = {"hf": tuple(MODEL_TYPES), "fla": ("6.0",)}.get(kind)
    if versions and config.version not in versions:
        raise UnsupportedError(
            f"{source} is version {config.version}, and a {kind} folder can only hold {', '.join(versions)}; use "
            ".safetensors or .pth"
        )
    if kind != "safetensors" and config.scaled_keys:
        raise UnsupportedError(
            f"{source} has scaled keys, which only a .safetensors of Fledge can record, not a {kind}"
        )
    if kind == "fla" and config.tuned_state:
        raise UnsupportedError(f"{source} has a tuned state, which a fla folder cannot hold; use .safetensors")


def _dequantize(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return the checkpoint without quantized matrices, and a note about it.

    They become bfloat16: 16 bits hold the precision of 8 or fewer, and every reader of these formats supports it.
    """
    if not checkpoint.quantized:
        return checkpoint, ()
    dense = replace(checkpoint, tensors=checkpoint.dequantize(torch.bfloat16), quantized={})
    return dense, ("the quantized matrices were written as bfloat16",)


def _convert_matrices(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """Convert all matrices, including quantized ones, to a dtype. Raises UnsupportedError for an overflow."""
    tensors = {
        name: tensor.to(dtype) if tensor.dim() == 2 and name.endswith(".weight") else tensor
        for name, tensor in checkpoint.dequantize(dtype).items()
    }
    lost = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if lost:
        raise UnsupportedError(f"{checkpoint.path}: {lost[0]} holds numbers that {dtype} cannot; choose bf16 or f32")
    return replace(checkpoint, tensors=tensors, quantized={})


def _write_file(checkpoint: Checkpoint, target: Path, kind: str) -> tuple[str, ...]:
    if kind == "safetensors":
        save(
            target,
            checkpoint.config,
            checkpoint.tensors,
            tokenizer_spec=checkpoint.tokenizer_spec,
            extra=checkpoint.extra,
            quantized=checkpoint.quantized,
        )
        return ()
    save(target, checkpoint.config, checkpoint.tensors)
    omitted = {
        "the tokenizer": checkpoint.tokenizer_spec,
        "the extras": checkpoint.extra,
        f"group_norm_eps {checkpoint.config.group_norm_eps}": checkpoint.config.group_norm_eps != DEFAULT_EPS,
    }
    return tuple(f"a .pth cannot hold {name}; it was left out" for name, present in omitted.items() if present)


def _write_folder(checkpoint: Checkpoint, target: Path, kind: str) -> tuple[str, ...]:
    config = checkpoint.config
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    notes: tuple[str, ...]
    if kind == "fla":
        tensors, settings, notes = to_fla(checkpoint.tensors), make_fla_config(config), FLA_NOTES
    else:
        tensors = {to_hf(name): tensor for name, tensor in checkpoint.tensors.items()}
        settings, notes = make_hf_config(config), list_hf_notes(config)
    stored = StoredMetadata(config, checkpoint.tokenizer_spec, checkpoint.extra)
    with _atomic_folder(target) as folder:
        write_safetensors(folder / "model.safetensors", tensors, metadata.encode(stored))
        with atomic_path(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return notes


@contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `target` if the block succeeds, and is removed otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()  # not `work` itself, which mkdtemp makes private to the user
        yield new
        if target.exists():
            target.replace(old)
        try:
            new.replace(target)
        except OSError:
            old.replace(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
