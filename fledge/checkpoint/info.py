"""What a checkpoint is, from names, shapes and dtypes: no weight is read, so any size takes a moment.

Here: facts and the arithmetic behind them. Not here: printing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge.checkpoint.reader import read
from fledge.models.config import ModelConfig

# What the number of vocabulary rows says about the tokenizer, where the file itself does not.
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
    dtypes: tuple[str, ...]  # the one that fills most bytes first; "int8" and "int4" are quantized matrices
    nbytes: int  # of the files that hold tensors
    state_nbytes: int  # of one sequence's state, float32; a transformer's for each token it has read
    flops_per_token: int  # see `compute_flops_per_token`
    tokenizer: str  # for people
    tokenizer_spec: dict[str, Any] | None
    extra: dict[str, Any]
    quantized: dict[str, QuantizedShare] = field(default_factory=dict)  # format -> what is in it

    @property
    def bits_per_weight(self) -> float | None:
        """Over the quantized matrices, scales and filling included; None where there are none."""
        if not self.quantized:
            return None
        shares = self.quantized.values()
        return 8 * sum(share.nbytes for share in shares) / sum(share.weights for share in shares)

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each fact, for a table."""
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
            ("work", f"{self.flops_per_token:,} floating-point operations a token"),
            ("tuned state", "yes" if config.tuned_state else "no"),
            *([("keys", "scaled by the decay")] if config.scaled_keys else []),
        ]

    @property
    def _state_of(self) -> str:
        return "for each token read" if self.config.version == "llama" else "a sequence, of any length"

    def _quantized_rows(self) -> list[tuple[str, str]]:
        if not self.quantized:
            return []
        shares = ", ".join(f"{share.matrices} in {format}" for format, share in self.quantized.items())
        return [("matrices", f"{shares}; {self.bits_per_weight:.2f} bits a weight of these")]


def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Format, version, sizes, bytes and tokenizer of a checkpoint. Raises CheckpointError as `load` does."""
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
    """Operations to read or write one token: 2 parameters + 6 D^2 L / h (paper, appendix E).

    2 for a multiplication and an addition with every parameter; the paper counts the embedding table like a matrix,
    though looking a row up costs nothing. The second term is the recurrence: D^2 / h = H N^2 numbers of state a layer.
    RWKV-4's recurrence works on single channels and is left out; so is a transformer's attention, 4 A L for each token
    before this one.
    """
    if config.version == "llama":
        return 2 * parameters
    return 2 * parameters + 6 * config.n_layer * config.n_head * config.head_size**2


def describe_tokenizer(config: ModelConfig, spec: Mapping[str, Any] | None) -> str:
    """The tokenizer stored with the model, or what its vocabulary size suggests."""
    if spec is not None:
        return f"{KINDS[spec['kind']].format(config.vocab_size)} (stored in the file)"
    return TOKENIZERS.get(config.vocab_size, f"unknown: none is stored, and {config.vocab_size} rows fit none we know")
