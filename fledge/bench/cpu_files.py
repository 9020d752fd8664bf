"""The files that the programs of `fledge bench cpu` read: one model, written once in every form that is needed.

    pth                        all bfloat16; for fledge and rwkv, as bf16 and as fp32
    int8, int4                 .safetensors as `fledge quantize` writes them; for fledge
    f32, bf16, q8_0, q4_0      .gguf as `fledge convert --type` writes them; for llama.cpp

All of them come from the .pth, so that all programs have the same weights up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fledge import checkpoint
from fledge.bench.random_model import config_of, random_tensors
from fledge.checkpoint.formats.gguf.header import read_header
from fledge.checkpoint.quantization.quantizer import quantize
from fledge.core.errors import UsageError
from fledge.engine.llm.loading import locate_checkpoint
from fledge.models import ModelConfig

KINDS = {
    "fledge": {"fp32": "pth", "bf16": "pth", "int8": "int8", "int4": "int4"},
    "llama.cpp": {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"},
    "rwkv": {"fp32": "pth", "bf16": "pth"},
}
"""Program -> width of the weights -> kind of file. The widths of one name are what is compared with each other."""

READ_BLOCK = 16 << 20


@dataclass(frozen=True)
class ModelFiles:
    """One model and its files by kind."""

    name: str
    config: ModelConfig
    paths: dict[str, Path]

    def of(self, program: str, width: str) -> Path:
        """What a program reads for a width."""
        return self.paths[KINDS[program][width]]


def random_files(shape: str, family: str, vocab: int, folder: Path, kinds: Iterable[str]) -> ModelFiles:
    """A model with random weights; files that the folder has already are used again."""
    config = config_of(shape, vocab, family)
    stem = f"{family}-{shape.upper()}-V{vocab}"
    source = folder / f"{stem}.pth"
    if not source.exists():
        checkpoint.save(source, config, random_tensors(config, torch.bfloat16))
    return ModelFiles(shape.upper(), config, _derived(source, folder, stem, kinds, again=True))


def model_files(model: str, folder: Path, kinds: Iterable[str]) -> ModelFiles:
    """A checkpoint of any format, rounded to bfloat16; every file is written anew, since its weights may have changed.

    Raises UsageError for a quantised one, CheckpointError as loading does.
    """
    found = checkpoint.read(locate_checkpoint(model))
    if found.quantized:
        raise UsageError(f"{model} is quantised already; give the checkpoint from before quantisation")
    stem = Path(os.fspath(model)).stem
    source = folder / f"{stem}.bfloat16.pth"
    checkpoint.save(source, found.config, {name: tensor.bfloat16() for name, tensor in found.tensors.items()})
    return ModelFiles(stem, found.config, _derived(source, folder, stem, kinds, again=False))


def _derived(source: Path, folder: Path, stem: str, kinds: Iterable[str], *, again: bool) -> dict[str, Path]:
    paths = {"pth": source}
    for kind in kinds:
        if kind == "pth":
            continue
        paths[kind] = folder / f"{stem}.{kind}.{'safetensors' if kind.startswith('int') else 'gguf'}"
        if again and paths[kind].exists():
            continue
        if kind.startswith("int"):
            quantize(source, paths[kind], kind, force=True)
        else:
            checkpoint.convert(source, paths[kind], matrix_type=kind, force=True)
    return paths


def read_once(path: Path) -> None:
    """Bring a file into memory, so that loading is timed without the disk, for every program alike."""
    with open(path, "rb", buffering=0) as file:
        while file.read(READ_BLOCK):
            pass


def gguf_bytes(path: Path) -> int:
    """Bytes of all tensors that llama.cpp reads for a token: everything but the embedding, of which it reads a row."""
    locations = read_header(path).locations
    return sum(place.nbytes for name, place in locations.items() if name != "token_embd.weight")
