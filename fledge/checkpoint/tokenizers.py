"""The tokenizer of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fledge.core.errors import UnsupportedError
from fledge.tokenizer import Tokenizer, byte_vocabulary, load_world, tokenizer_for

NEOX_SIZE = 50277
"""Token rows of the models trained on the Pile, which use the GPT-NeoX tokenizer."""


def load_tokenizer(spec: Mapping[str, Any] | None, vocab_size: int, source: str) -> Tokenizer:
    """The tokenizer that the checkpoint records in `spec`, or else the one that its vocabulary size implies.

    source: the name of the checkpoint in errors. Raises UnsupportedError if the tokenizer is unknown.
    """
    if spec is not None:
        return tokenizer_for(spec)
    if vocab_size == 65536:
        return load_world()
    if vocab_size == 256:
        return tokenizer_for(byte_vocabulary())
    if vocab_size == NEOX_SIZE:
        raise UnsupportedError(
            f"{source} has {NEOX_SIZE} token rows: a Pile model, whose GPT-NeoX tokenizer is not part of Fledge. It "
            "cannot read or generate text here; `fledge info` and `fledge convert` work"
        )
    raise UnsupportedError(
        f"{source} has {vocab_size} token rows and no stored vocabulary; known sizes: 65536 (World), 256 (bytes). "
        "A .safetensors file written by Fledge stores a pruned vocabulary; a .pth file cannot"
    )
