"""The record of a Fledge safetensors file: config, vocabulary and extras as one JSON text.

It is in the string map of the header under the key "fledge", which other readers ignore:
    {"format": 1, "config": {...}, "tokenizer": {...} or null, "extra": {...}}
A file with quantized matrices has format 2, and in addition "quantised": {name: [format, rows, columns]}. The tensor of
that name is uint8, with the layout described in fledge/kernels/quantized.py.
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
FORMAT = 2  # the newest format that is read; files are written in the oldest possible one
MAX_SIDE = 1 << 32


def encode(stored: StoredMetadata) -> dict[str, str]:
    """Return the string map of the header. The loaders of Hugging Face require "format": "pt"."""
    assert stored.config is not None
    record = {
        "format": 2 if stored.quantized else 1,
        "config": asdict(stored.config),
        "tokenizer": stored.tokenizer_spec,
        "extra": stored.extra,
    }
    if stored.quantized:
        record["quantised"] = {name: list(spec) for name, spec in stored.quantized.items()}
    try:
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the tokenizer record and the extras of a checkpoint must be plain JSON: {error}") from error
    return {"format": "pt", KEY: text}


def decode(metadata: Mapping[str, str], source: str) -> StoredMetadata:
    """Parse the string map; the result is empty if Fledge did not write the file. Raises CheckpointError for damage."""
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
    quantized = _parse_specs(record.get("quantised", {}), source)
    try:
        return StoredMetadata(from_dict(ModelConfig, config), tokenizer, extra, quantized)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source}: the config in its header is impossible: {error}") from error


def _parse_specs(record: Any, source: str) -> dict[str, MatrixSpec]:
    """Parse and check the list of quantized matrices."""
    if not isinstance(record, dict):
        raise CheckpointError(f"{source}: the list of quantized matrices in its header is damaged")
    for name, spec in record.items():
        valid = isinstance(spec, list) and len(spec) == 3 and spec[0] in FORMATS
        if not valid or not all(type(side) is int and 0 < side < MAX_SIDE for side in spec[1:]):
            raise CheckpointError(
                f"{source}: its header says that {name!r:.80} is quantized as {spec!r:.60}, which is not a valid format"
            )
    return {name: (spec[0], spec[1], spec[2]) for name, spec in record.items()}


def check_vocabulary(config: ModelConfig, spec: Mapping[str, Any] | None, source: str) -> None:
    """Raise CheckpointError unless the tokenizer of `spec` has as many rows as the model."""
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
    """Raise CheckpointError if a model and its data have different vocabularies. None is an unknown vocabulary."""
    if model is None or data is None:
        return
    of_model, of_data = Vocabulary.from_spec(model), Vocabulary.from_spec(data)
    if of_model != of_data:
        kinds = [f"{each.kind}, {each.size} rows, {each.fingerprint[:12]}..." for each in (of_model, of_data)]
        raise CheckpointError(
            f"{source} has another vocabulary ({kinds[0]}) than the data ({kinds[1]}), so the same ids mean other "
            "texts; tokenize the data with the vocabulary of the model, or start from another model"
        )
