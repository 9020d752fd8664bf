"""What Fledge stores beside the tensors of a safetensors file: config, vocabulary record and extras, as one JSON text.

It sits in the header's string map under the key "fledge", where other readers ignore it:
    {"format": 1, "config": {...}, "tokenizer": {...} or null, "extra": {...}}
A file with quantized matrices has format 2, and in addition "quantised": {name: [format, rows, columns]}; the tensor of
that name is then uint8, laid out as fledge/kernels/quantized.py says. No tensors here, no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fledge.checkpoint.record import MatrixSpec, StoredMetadata
from fledge.core.config import from_dict
from fledge.core.errors import CheckpointError, ConfigError, TokenizerError, UnsupportedError, UsageError
from fledge.kernels.quantized import FORMATS
from fledge.models.config import ModelConfig
from fledge.tokenizer.vocabulary import Vocabulary

KEY = "fledge"
FORMAT = 2  # the newest that is read; a file is written as old as its content allows
LARGEST_SIDE = 1 << 32


def encode(stored: StoredMetadata) -> dict[str, str]:
    """The header's string map. "format": "pt" is what Hugging Face's loaders ask for."""
    assert stored.config is not None
    record = {
        "format": 2 if stored.quantized else 1,
        "config": asdict(stored.config),
        "tokenizer": stored.tokenizer_spec,
        "extra": stored.extra,
    }
    if stored.quantized:
        record["quantised"] = {name: list(form) for name, form in stored.quantized.items()}
    try:
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the tokenizer record and the extras of a checkpoint must be plain JSON: {error}") from error
    return {"format": "pt", KEY: text}


def decode(metadata: Mapping[str, str], source: str) -> StoredMetadata:
    """The inverse; an empty record where the file was not written by Fledge. Raises CheckpointError on damage."""
    if KEY not in metadata:
        return StoredMetadata()
    try:
        record = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: the Fledge record in its header is not JSON: {error}") from error
    number = record.get("format") if isinstance(record, dict) else None
    if not isinstance(number, int) or number < 1:
        raise CheckpointError(f"{source}: the Fledge record in its header has no format number; the file is damaged")
    if number > FORMAT:
        raise UnsupportedError(
            f"{source} was written by a newer Fledge (record format {number}, this one reads {FORMAT}); update Fledge"
        )
    config, tokenizer, extra = record.get("config"), record.get("tokenizer"), record.get("extra", {})
    if not isinstance(config, dict) or not isinstance(tokenizer, dict | None) or not isinstance(extra, dict):
        raise CheckpointError(f"{source}: the Fledge record in its header is incomplete; the file is damaged")
    quantized = _forms(record.get("quantised", {}), source)
    try:
        return StoredMetadata(from_dict(ModelConfig, config), tokenizer, extra, quantized)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source}: the config in its header is impossible: {error}") from error


def _forms(found: Any, source: str) -> dict[str, MatrixSpec]:
    """Which matrices are quantized and how, checked."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: the list of quantized matrices in its header is damaged")
    for name, form in found.items():
        sound = isinstance(form, list) and len(form) == 3 and form[0] in FORMATS
        if not sound or not all(type(side) is int and 0 < side < LARGEST_SIDE for side in form[1:]):
            raise CheckpointError(
                f"{source}: its header says that {name!r:.80} is quantized as {form!r:.60}; no such form"
            )
    return {name: (form[0], form[1], form[2]) for name, form in found.items()}


def check_vocabulary(config: ModelConfig, spec: Mapping[str, Any] | None, source: str) -> None:
    """Raise CheckpointError unless the tokenizer of `spec` needs exactly as many rows as the model has."""
    if spec is None:
        return
    try:
        needed = Vocabulary.from_spec(spec).size
    except TokenizerError as error:
        raise CheckpointError(f"{source}: the tokenizer stored with the model cannot be used: {error}") from error
    if needed != config.vocab_size:
        raise CheckpointError(
            f"{source}: the model has {config.vocab_size} vocabulary rows, but the {spec['kind']} tokenizer stored "
            f"with it needs {needed}"
        )


def check_same_vocabulary(model: Mapping[str, Any] | None, data: Mapping[str, Any] | None, source: str) -> None:
    """Raise CheckpointError where a model and the ids it is to read are of different vocabularies; None: not told."""
    if model is None or data is None:
        return
    theirs, ours = Vocabulary.from_spec(model), Vocabulary.from_spec(data)
    if theirs != ours:
        kinds = [f"{one.kind}, {one.size} rows, {one.fingerprint[:12]}..." for one in (theirs, ours)]
        raise CheckpointError(
            f"{source} has another vocabulary ({kinds[0]}) than the data ({kinds[1]}), so the same ids mean other "
            "texts; tokenise the data with the model's vocabulary, or begin with another model"
        )
