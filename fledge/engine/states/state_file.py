"""State files: a state with metadata that says which model made it and what it has read.

    safetensors, float32: the tensors of the state, as `State.save` writes them
    metadata: fledge_state (its class), fledge_card (JSON: `StateMetadata`), and optionally
    fledge_signature (HMAC-SHA256 in hex over the metadata and each tensor with its name, dtype and shape)

Many models have the same sizes, so the metadata identifies the model by the hash of its weights. Files may come from
anywhere: any invalid file raises a StateError of one line, and nothing in a file is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fledge import checkpoint
from fledge.core.errors import StateError
from fledge.core.files import atomic_path
from fledge.core.safetensors_header import HeaderError, read_header, reject_repeated_names
from fledge.models.config import ModelConfig
from fledge.models.state import COUNTS, KIND, KINDS, State

METADATA, SIGNATURE = "fledge_card", "fledge_signature"
MAX_FILE_BYTES = 1 << 32
"""The state of the largest model has a hundredth of that."""

MAX_HEADER_BYTES = 1 << 20
MAX_TITLE_LENGTH = 200  # characters
MAX_TOKENS = 1 << 62
RANKS = {"wkv": 5, "keys": 5, "values": 5, "begin": 2, "end": 2}  # of all other tensors 3


@dataclass(frozen=True)
class StateMetadata:
    """Which model made a state, and what the state has read."""

    identity: str  # of the weights, see `fledge.checkpoint.identity` and `LLM.identity`
    model: str  # its name, for display
    tokens: int  # number of tokens read; 0 if unknown
    template: str | None = None  # of the chat the state belongs to; None: plain text
    title: str = ""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    source: str | None = None  # SHA-256 of everything read, see read_document.py; None: not recorded
    family: str = ""  # of the model, with its version

    @classmethod
    def create(
        cls,
        identity: str,
        model: str,
        config: ModelConfig,
        tokens: int,
        *,
        template: str | None = None,
        title: str = "",
    ) -> StateMetadata:
        """Metadata of a new state of the model with this identity, name and config. A long title is truncated."""
        family = f"{config.family}, {config.version}"
        return cls(identity, model, tokens, template, title[:MAX_TITLE_LENGTH], family=family)

    def check(self, identity: str, model: str) -> None:
        """Raise StateError unless the weights with this identity made the state. `model` is their name in the error."""
        if self.identity != identity:
            raise StateError(
                f"the state was made by {self.model} ({checkpoint.shorten_identity(self.identity)}), not by {model} "
                f"({checkpoint.shorten_identity(identity)}): a state works only with the weights that made it"
            )


class LoadedState(NamedTuple):
    """A state from a file, and its metadata."""

    state: State
    metadata: StateMetadata


def write_state(path: str | os.PathLike[str], state: State, metadata: StateMetadata) -> None:
    """Write a state file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_state(state, metadata))


def read_state(path: str | os.PathLike[str], secret: bytes | None = None) -> LoadedState:
    """Read a file that `write_state` wrote. Raises StateError, which names the file, for any other file."""
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise StateError("it is too large to be a state")
        return decode_state(Path(path).read_bytes(), secret)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None
    except StateError as error:
        raise StateError(f"{path} is not a valid state file: {error}") from None


def encode_state(state: State, metadata: StateMetadata, secret: bytes | None = None) -> bytes:
    """The content of a state file, signed if there is a secret."""
    text = json.dumps(dataclasses.asdict(metadata), ensure_ascii=False, sort_keys=True)
    header = {METADATA: text}
    if secret is not None:
        header[SIGNATURE] = _sign(secret, type(state).__name__, text, state.to("cpu").tensors())
    return state.encode(header)


def decode_state(data: bytes, secret: bytes | None = None) -> LoadedState:
    """The state and the metadata in the content of a state file.

    Raises StateError for invalid content and, if there is a secret, for content that was not signed with it.
    """
    header = _read_header(io.BytesIO(data), len(data))
    try:
        kind, text = KINDS[header[KIND]], header[METADATA]
        tensors = safetensors.torch.load(data)
    except (KeyError, TypeError):
        raise StateError("it has no Fledge metadata") from None
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: a shape with more elements than torch can count
        raise StateError(f"it is damaged: {str(error).partition(chr(10))[0]}") from None
    _check_tensors(kind, tensors)  # before they are hashed, as numpy does not support every dtype
    if secret is not None:
        signature, expected = header.get(SIGNATURE, ""), _sign(secret, header[KIND], text, tensors)
        if not hmac.compare_digest(expected.encode(), signature.encode(errors="replace")):
            raise StateError("it was not signed with this server's key, or it has changed since")
    return LoadedState(kind(**tensors), _parse_metadata(text))


def read_metadata(path: str | os.PathLike[str]) -> StateMetadata:
    """The metadata of a file, without reading its tensors or checking its signature. Raises StateError, OSError."""
    with open(path, "rb") as file:
        header = _read_header(file, os.fstat(file.fileno()).st_size)
    return _parse_metadata(header.get(METADATA))


def _read_header(file: BinaryIO, size: int) -> Mapping[str, str]:
    """The metadata in the header of a file of `size` bytes."""
    try:
        header = read_header(file, size, MAX_HEADER_BYTES).metadata
    except HeaderError as error:
        raise StateError(f"it is not a Fledge state file: {error}") from None
    if header is None or not header.keys() <= {KIND, METADATA, SIGNATURE}:
        raise StateError("it is not a Fledge state file")
    return header


def _check_tensors(kind: type[State], tensors: Mapping[str, Tensor]) -> None:
    names = [each.name for each in dataclasses.fields(kind)]
    if sorted(tensors) != sorted(names):
        raise StateError(f"it holds {', '.join(sorted(tensors))!r:.200}, not {', '.join(names)}")
    for name, tensor in tensors.items():
        dtype = torch.long if name in COUNTS else torch.float32
        if tensor.dtype != dtype or tensor.dim() != RANKS.get(name, 3):
            raise StateError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {dtype}")
        # numpy, not torch: torch's threads wait for each other, which dominates the time on a busy machine.
        if not np.isfinite(tensor.numpy()).all():
            raise StateError(f"{name} has values that are not finite")
    if len({tensor.shape[1] for tensor in tensors.values()}) > 1:
        raise StateError("its tensors have different numbers of sequences")
    if len({tensor.shape[0] for name, tensor in tensors.items() if name not in COUNTS}) > 1:
        raise StateError("its tensors have different numbers of layers")


def _parse_metadata(text: Any) -> StateMetadata:
    """The metadata, with the type of each value checked."""
    try:
        values = json.loads(text, object_pairs_hook=reject_repeated_names)
        metadata = StateMetadata(**values)
        json.dumps(values, ensure_ascii=False).encode()  # fails for a lone surrogate, which cannot be written again
    except (ValueError, TypeError, RecursionError):
        raise StateError("its metadata cannot be read") from None
    texts = (metadata.identity, metadata.model, metadata.title, metadata.created, metadata.family)
    optional = (metadata.template, metadata.source)
    if not (
        all(isinstance(value, str) for value in texts)
        and all(value is None or isinstance(value, str) for value in optional)
        and type(metadata.tokens) is int
        and 0 <= metadata.tokens < MAX_TOKENS
    ):
        raise StateError("its metadata has values of the wrong type")
    return metadata


def _sign(secret: bytes, kind: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hmac.new(secret, f"{kind}\n{text}\n".encode(), hashlib.sha256)
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
