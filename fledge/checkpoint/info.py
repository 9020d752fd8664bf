"""Facts about a checkpoint, from names, shapes and dtypes. No weight is read, so any size takes a moment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge.checkpoint.reader import read
from fledge.models.config import ModelConfig

# The tokenizer that a number of vocabulary rows implies, if the file does not record it.
TOKENIZERS = {
    65536: "World (guessed from the 65536 vocabulary rows)",
    50277: "GPT-NeoX 20B (guessed from the 50277 vocabulary rows); Fledge does not ship it, so give token ids",
    256: "bytes (guessed from the 256 vocabulary rows)",
}
KINDS = {"world": "World", "bytes": "bytes", "pruned": "World, pruned to {} rows"}


@dataclass(frozen=True)
class QuantizedShare:
    """The quantized matrices of one format."""

    matrices: int
    weights: int
    nbytes: int


@dataclass(frozen=True)
class CheckpointInfo:
    """The facts about one checkpoint."""

    path: Path
    format: str  # "pth", "safetensors", "gguf", "hf" or "fla"
    config: ModelConfig
    parameters: int  # numbers in all tensors but a tuned state
    dtypes: tuple[str, ...]  # by bytes, largest first; "int8" and "int4" are quantized matrices
    nbytes: int  # of the files that hold tensors
    state_nbytes: int  # of the float32 state of a sequence; of a transformer, for each token
    flops_per_token: int  # see `compute_flops_per_token`
    tokenizer: str  # a description
    tokenizer_spec: dict[str, Any] | None
    extra: dict[str, Any]
    quantized: dict[str, QuantizedShare] = field(default_factory=dict)  # format -> its matrices

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per quantized weight, with scales and padding; None without quantized matrices."""
        if not self.quantized:
            return None
        shares = self.quantized.values()
        return 8 * sum(share.nbytes for share in shares) / sum(share.weights for share in shares)

    def to_rows(self) -> list[tuple[str, str]]:
        """Return the label and text of each fact, for a table."""
        config = self.config
        sizes = f"{config.n_layer} layers, width {config.n_embd}, hidden {config.dim_ffn}"
        heads = f", {config.n_head} heads of {config.head_size}" if config.n_head else ""
        return [
            ("file", str(self.path)),
            ("format", self.format),
            ("model", f"{config.family}, version {config.version}"),
            ("sizes", sizes + heads),
            ("vocabulary", f"{config.vocab_size} rows"),
            ("tokenizer", self.tokenizer),
            ("parameters", f"{self.parameters:,}"),
            ("dtype", ", ".join(self.dtypes)),
            *self._quantized_rows(),
            ("on disk", f"{self.nbytes:,} bytes"),
            ("state", f"{self.state_nbytes:,} bytes {self._state_of}"),
            ("work", f"{self.flops_per_token:,} floating-point operations per token"),
            ("tuned state", "yes" if config.tuned_state else "no"),
            *([("keys", "scaled by the decay")] if config.scaled_keys else []),
        ]

    @property
    def _state_of(self) -> str:
        return "for each token read" if self.config.version == "llama" else "per sequence, of any length"

    def _quantized_rows(self) -> list[tuple[str, str]]:
        if not self.quantized:
            return []
        shares = ", ".join(f"{share.matrices} in {format}" for format, share in self.quantized.items())
        return [("matrices", f"{shares}; {self.bits_per_weight:.2f} bits per weight of these")]


def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Return format, version, sizes, bytes and tokenizer of a checkpoint. Raises CheckpointError as `load` does."""
    checkpoint = read(path, weights=False)
    config = checkpoint.config
    bytes_of: dict[str, int] = {}
    shares: dict[str, QuantizedShare] = {}
    parameters = 0
    for name, tensor in checkpoint.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        bytes_of[dtype] = bytes_of.get(dtype, 0) + tensor.numel() * tensor.element_size()
        parameters += 0 if name.endswith(".time_state") else tensor.numel()
    for matrix in checkpoint.quantized.values():
        bytes_of[matrix.format] = bytes_of.get(matrix.format, 0) + matrix.nbytes
        parameters += matrix.rows * matrix.columns
        share = shares.get(matrix.format, QuantizedShare(0, 0, 0))
        weights, nbytes = share.weights + matrix.rows * matrix.columns, share.nbytes + matrix.nbytes
        shares[matrix.format] = QuantizedShare(share.matrices + 1, weights, nbytes)
    return CheckpointInfo(
        path=checkpoint.path,
        format=checkpoint.format,
        config=config,
        parameters=parameters,
        dtypes=tuple(sorted(bytes_of, key=lambda dtype: -bytes_of[dtype])),
        nbytes=sum(file.stat().st_size for file in checkpoint.files),
        state_nbytes=4 * config.state_floats,
        flops_per_token=compute_flops_per_token(config, parameters),
        tokenizer=describe_tokenizer(config, checkpoint.tokenizer_spec),
        tokenizer_spec=checkpoint.tokenizer_spec,
        extra=checkpoint.extra,
        quantized=shares,
    )


def compute_flops_per_token(config: ModelConfig, parameters: int) -> int:
    """Return the operations per token: 2 parameters + 6 D^2 L / h (paper, appendix E).

    2 stands for a multiplication and an addition with every parameter. The paper counts the embedding table like a
    matrix, although the lookup of a row costs nothing. The second term is the recurrence: D^2 / h = H N^2 state numbers
    per layer. The recurrence of RWKV-4 works on single channels and is not counted; nor is the attention of a
    transformer, 4 A L for each earlier token.
    """
    if config.version == "llama":
        return 2 * parameters
    return 2 * parameters + 6 * config.n_layer * config.n_head * config.head_size**2


def describe_tokenizer(config: ModelConfig, spec: Mapping[str, Any] | None) -> str:
    """Describe the tokenizer stored with the model, or the one that the vocabulary size implies."""
    if spec is not None:
        return f"{KINDS[spec['kind']].format(config.vocab_size)} (stored in the file)"
    return TOKENIZERS.get(config.vocab_size, f"unknown: none is stored, and no known one has {config.vocab_size} rows")
