"""The files that the programs of `fledge bench cpu` load: one model, in every format that is needed.

    pth                        all bfloat16; for Fledge and rwkv, as bf16 and as fp32
    int8, int4                 .safetensors as `fledge quantize` writes them; for Fledge
    f32, bf16, q8_0, q4_0      .gguf as `fledge convert --type` writes them; for llama.cpp

All files are made from the .pth, so all programs have the same weights except for rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fledge import checkpoint
from fledge.bench.random_model import config_of_shape, random_tensors
from fledge.checkpoint.formats.gguf.header import read_header
from fledge.checkpoint.quantization.quantizer import quantize
from fledge.core.errors import UsageError
from fledge.engine.llm.loading import locate_checkpoint
from fledge.models import ModelConfig

FILE_KINDS = {
    "fledge": {"fp32": "pth", "bf16": "pth", "int8": "int8", "int4": "int4"},
    "llama.cpp": {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"},
    "rwkv": {"fp32": "pth", "bf16": "pth"},
}
"""Library -> width of the weights -> kind of file. Equal widths are compared with each other."""

READ_BLOCK = 16 << 20


@dataclass(frozen=True)
class ModelFiles:
    """One model and its files by kind."""

    name: str
    config: ModelConfig
    paths: dict[str, Path]

    def path(self, library: str, width: str) -> Path:
        """Return the file that a library loads for a width."""
        return self.paths[FILE_KINDS[library][width]]


def write_random_files(shape: str, family: str, vocab: int, folder: Path, kinds: Iterable[str]) -> ModelFiles:
    """Write a model with random weights. Files that exist in the folder are used again."""
    config = config_of_shape(shape, vocab, family)
    stem = f"{family}-{shape.upper()}-V{vocab}"
    source = folder / f"{stem}.pth"
    if not source.exists():
        checkpoint.save(source, config, random_tensors(config, torch.bfloat16))
    return ModelFiles(shape.upper(), config, _convert(source, stem, kinds, reuse=True))


def write_model_files(model: str, folder: Path, kinds: Iterable[str]) -> ModelFiles:
    """Write a checkpoint of any format, rounded to bfloat16. Existing files are replaced: the weights may have changed.

    Raises UsageError for a quantized checkpoint, and CheckpointError as loading does.
    """
    source = checkpoint.read(locate_checkpoint(model))
    if source.quantized:
        raise UsageError(f"{model} is already quantized; pass the checkpoint that it was made from")
    stem = Path(os.fspath(model)).stem
    path = folder / f"{stem}.bfloat16.pth"
    checkpoint.save(path, source.config, {name: tensor.bfloat16() for name, tensor in source.tensors.items()})
    return ModelFiles(stem, source.config, _convert(path, stem, kinds, reuse=False))


def _convert(source: Path, stem: str, kinds: Iterable[str], *, reuse: bool) -> dict[str, Path]:
    paths = {"pth": source}
    for kind in kinds:
        if kind == "pth":
            continue
        paths[kind] = source.parent / f"{stem}.{kind}.{'safetensors' if kind.startswith('int') else 'gguf'}"
        if reuse and paths[kind].exists():
            continue
        if kind.startswith("int"):
            quantize(source, paths[kind], kind, force=True)
        else:
            checkpoint.convert(source, paths[kind], matrix_type=kind, force=True)
    return paths


def warm_page_cache(path: Path) -> None:
    """Read a file once, so that the disk does not affect the load time of any program."""
    with open(path, "rb", buffering=0) as file:
        while file.read(READ_BLOCK):
            pass


def gguf_matrix_bytes(path: Path) -> int:
    """Return the bytes of the tensors that llama.cpp reads per token: all but the embedding, a lookup of one row."""
    locations = read_header(path).locations
    return sum(location.nbytes for name, location in locations.items() if name != "token_embd.weight")
