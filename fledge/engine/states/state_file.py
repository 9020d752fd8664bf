"""A state as a file: what a model has read, to be kept, sent, and gone on from by the same model.

    safetensors, float32: the tensors of the state, as `State.save` writes them
    metadata: fledge_state (its class), fledge_card (JSON: what it belongs to), and perhaps
    fledge_signature (HMAC-SHA256, in hex, over the card and every tensor with its name, dtype and shape)

A state of other weights is not refused by its sizes alone, which many models share, but by the hash of the weights that
the card holds. Files come from anywhere: whatever is not sound is a StateError of one line, and nothing in them is run.
Not here: where states are kept (shelf.py).
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
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fledge import checkpoint
from fledge.core.errors import StateError
from fledge.core.files import atomic_path
from fledge.core.safetensors_header import HeaderError, read_header, reject_repeated_names
from fledge.engine.llm.adapters import weights_of
from fledge.engine.llm.llm import LLM
from fledge.models.state import COUNTS, KIND, KINDS, State

CARD, SIGNATURE = "fledge_card", "fledge_signature"
LARGEST = 1 << 32
"""Bytes of a file at most; the state of the largest model is a hundredth of that."""

HEADER = 1 << 20
TITLE = 200  # characters
RANKS = {"wkv": 5, "keys": 5, "values": 5, "begin": 2, "end": 2}  # of all others 3
MOST_TOKENS = 1 << 62

_identities: WeakKeyDictionary[LLM, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class StateMetadata:
    """What a state belongs to, and what it has read."""

    identity: str  # of the weights, see fledge.checkpoint.identity
    model: str  # its name, for people
    tokens: int  # read in all
    template: str | None = None  # of the chat it is in the middle of; None: plain text
    title: str = ""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    source: str | None = None  # SHA-256 of all it has read, see reading.py; None: not told
    family: str = ""  # of the model, with its version

    @classmethod
    def of(cls, llm: LLM, identity: str, *, tokens: int, template: str | None = None, title: str = "") -> StateMetadata:
        """The card of a state that `llm` has come to."""
        return cls(
            identity, llm.name, tokens, template, title[:TITLE], family=f"{llm.config.family}, {llm.config.version}"
        )

    def check(self, identity: str, model: str) -> None:
        """Raise StateError unless the state is one of the model with these weights."""
        if self.identity != identity:
            raise StateError(
                f"the state was made by {self.model} ({checkpoint.shorten_identity(self.identity)}), not by {model} "
                f"({checkpoint.shorten_identity(identity)}): only the same weights can go on from it"
            )


def identity_of(llm: LLM) -> str:
    """The hash of the weights that `llm` computes with; adapters count, and a tuned initial state does not.

    So does rounding while loading. Reads the checkpoint again, as a native model keeps no weights as they were: seconds
    for a large one, and once for each LLM. Raises StateError for a model whose weights are nowhere to be read.
    """
    known = _identities.get(llm)
    if known is None:
        known = _identities[llm] = _identity_of(llm)
    return known


def _identity_of(llm: LLM) -> str:
    found = weights_of(llm)
    if not found.tensors.keys() | found.quantized.keys() >= checkpoint.get_expected_shapes(found.config).keys():
        raise StateError(
            f"{llm.name} was made in memory and keeps no weights as they were, so nothing tells which states are its "
            "own; load it from a checkpoint"
        )
    base = checkpoint.compute_identity(found)
    return hashlib.sha256(f"{base}\n{llm.altered}".encode()).hexdigest() if llm.altered else base


def write_state(path: str | os.PathLike[str], state: State, card: StateMetadata) -> None:
    """A state with its card, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(dump(state, card))


def read_state(path: str | os.PathLike[str], secret: bytes | None = None) -> tuple[State, StateMetadata]:
    """What `write_state` wrote. Raises StateError for any other file, naming it."""
    try:
        if os.path.getsize(path) > LARGEST:
            raise StateError("it is too large to be a state")
        return parse(Path(path).read_bytes(), secret)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None
    except StateError as error:
        raise StateError(f"{path} is no state that can be used: {error}") from None


def dump(state: State, card: StateMetadata, secret: bytes | None = None) -> bytes:
    """The file's content; signed where there is a secret."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors().items()}
    text = json.dumps(dataclasses.asdict(card), ensure_ascii=False, sort_keys=True)
    metadata = {KIND: type(state).__name__, CARD: text}
    if secret is not None:
        metadata[SIGNATURE] = _signature(secret, metadata[KIND], text, tensors)
    return safetensors.torch.save(tensors, metadata)


def parse(data: bytes, secret: bytes | None = None) -> tuple[State, StateMetadata]:
    """The state in a file's content, and its card. Raises StateError for what is not sound, and, with a secret, for
    what was not signed with it."""
    metadata = _metadata(io.BytesIO(data), len(data))
    try:
        kind, text = KINDS[metadata[KIND]], metadata[CARD]
        tensors = safetensors.torch.load(data)
    except (KeyError, TypeError):
        raise StateError("it has no card of Fledge's that says what it is") from None
    except (SafetensorError, RuntimeError) as error:  # torch's own: a shape that it cannot count
        raise StateError(f"it is damaged: {str(error).partition(chr(10))[0]}") from None
    _check_tensors(kind, tensors)  # before they are hashed, as numpy does not know every dtype
    if secret is not None:
        told, signature = str(metadata.get(SIGNATURE, "")), _signature(secret, metadata[KIND], text, tensors)
        if not hmac.compare_digest(signature.encode(), told.encode(errors="replace")):
            raise StateError("it was not signed here, or changed since")
    return kind(**tensors), _card(text)


def peek(path: str | os.PathLike[str]) -> StateMetadata:
    """The card of a file, without its tensors and without a look at its signature. Raises StateError, OSError."""
    with open(path, "rb") as file:
        metadata = _metadata(file, os.fstat(file.fileno()).st_size)
    return _card(metadata.get(CARD))


def _metadata(file: BinaryIO, size: int) -> Mapping[str, str]:
    """The texts in the header, which the library gives for files only."""
    try:
        metadata = read_header(file, size, HEADER).metadata
    except HeaderError as error:
        raise StateError(f"it is no state file of Fledge's: {error}") from None
    if metadata is None or not metadata.keys() <= {KIND, CARD, SIGNATURE}:
        raise StateError("it is no state file of Fledge's")
    return metadata


def _check_tensors(kind: type[State], tensors: Mapping[str, Tensor]) -> None:
    names = [each.name for each in dataclasses.fields(kind)]
    if sorted(tensors) != sorted(names):
        raise StateError(f"it holds {', '.join(sorted(tensors))!r:.200}, not {', '.join(names)}")
    for name, tensor in tensors.items():
        want = torch.long if name in COUNTS else torch.float32
        if tensor.dtype != want or tensor.dim() != RANKS.get(name, 3):
            raise StateError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {want}")
        # Not torch: its threads wait for each other, which on a busy machine takes longer than all the rest.
        if not np.isfinite(tensor.numpy()).all():
            raise StateError(f"{name} holds numbers that are not finite")
    if len({tensor.shape[1] for tensor in tensors.values()}) > 1:
        raise StateError("its tensors are of different numbers of texts")
    if len({tensor.shape[0] for name, tensor in tensors.items() if name not in COUNTS}) > 1:
        raise StateError("its tensors are of different numbers of layers")


def _card(text: Any) -> StateMetadata:
    """A card, every value of the kind it must have."""
    try:
        values = json.loads(text, object_pairs_hook=reject_repeated_names)
        card = StateMetadata(**values)
        json.dumps(values, ensure_ascii=False).encode()  # fails for a lone surrogate, which nothing could write again
    except (ValueError, TypeError, RecursionError):
        raise StateError("its card cannot be read") from None
    texts = (card.identity, card.model, card.title, card.created, card.family)
    optional = (card.template, card.source)
    if not (
        all(isinstance(value, str) for value in texts)
        and all(value is None or isinstance(value, str) for value in optional)
        and type(card.tokens) is int
        and 0 <= card.tokens < MOST_TOKENS
    ):
        raise StateError("its card holds values of a wrong kind")
    return card


def _signature(secret: bytes, kind: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hmac.new(secret, f"{kind}\n{text}\n".encode(), hashlib.sha256)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
