"""Token stores: open them, read their token ids, and check their files for damage.

A folder written by `fledge data build` contains

    train.bin, train.idx              binidx; every document is followed by id 0
    validation.bin, validation.idx    the same for held-out documents; with deduplication (the default), no training
                                      document is a duplicate or near duplicate of one
    validation.jsonl                  language, source, bytes and tokens of each validation document
    tokenizer.json                    the specification of the vocabulary
    manifest.json, report.html        inputs, settings and statistics of the build

A pair X.bin, X.idx of other software is a store without a validation part and without a recorded vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.core.errors import ConfigError, DataError, TokenizerError, UsageError
from fledge.core.files import hash_file, read_json
from fledge.data.binidx import BinIdx, get_binidx_paths
from fledge.tokenizer import Vocabulary

SEPARATOR = 0  # follows every document: the end-of-text id of World and of every pruned vocabulary
PARTS = ("train", "validation")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VALIDATION_RECORDS = "validation.jsonl"
WORLD_SPEC = {"kind": "world"}
READ_BYTES = 1 << 24  # bytes of ids read at once


@dataclass(frozen=True)
class ValidationDocument:
    """One validation document: its record and its ids without the separator."""

    language: str
    source: str
    bytes: int
    ids: npt.NDArray[Any]


class TokenStore:
    """An open store. The ids are mapped into memory."""

    def __init__(
        self, prefixes: Mapping[str, Path], spec: dict[str, Any] | None, manifest: dict[str, Any], vocab_size: int = 0
    ) -> None:
        """vocab_size: the size of the vocabulary if it is not recorded. With 0 and no `spec`, World is assumed."""
        self._prefixes = prefixes
        self.tokenizer_spec = dict(WORLD_SPEC) if spec is None and not vocab_size else spec
        """The specification of the vocabulary, for `fledge.tokenizer.tokenizer_for`; None if it is unknown."""
        self.has_vocabulary = spec is not None
        """Whether the store records its vocabulary. If not, it is World, or unknown if the user set `vocab_size`."""
        self.manifest = manifest
        """The manifest of the build; empty for a pair of files."""
        self._vocab_size = vocab_size

    @cached_property
    def vocab_size(self) -> int:
        """Number of embedding rows that a model needs. Every id is below it."""
        return Vocabulary.from_spec(self.tokenizer_spec).size if self.tokenizer_spec else self._vocab_size

    @cached_property
    def max_id(self) -> int:
        """The largest training id. Reads all ids, one block at a time. Raises DataError for a negative id."""
        index = self.index("train")
        smallest = largest = 0
        with open(index.bin_path, "rb") as file:
            while len(ids := np.frombuffer(file.read(READ_BYTES), dtype=index.dtype)):
                smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
        if smallest < 0:
            raise DataError(
                f"{index.bin_path} contains the id {smallest}; ids cannot be negative. Check that the type "
                f"{index.dtype.name} in {index.idx_path.name} is correct"
            )
        return largest

    def _bound_ids(self, vocab_size: int) -> int:
        """The largest id, or the largest value of the id type if every value is below `vocab_size`."""
        dtype = self.index("train").dtype
        type_max = int(np.iinfo(dtype).max)
        return type_max if dtype.kind == "u" and type_max < vocab_size else self.max_id

    def with_vocab_size(self, vocab_size: int) -> TokenStore:
        """This store for a model with `vocab_size` embedding rows; 0: the size of the vocabulary.

        If the store records its vocabulary, only its size is valid. Otherwise any number above all ids is valid, and
        the returned store has no vocabulary unless the number is that of World. Raises ConfigError for other numbers.
        """
        recorded = self.vocab_size
        vocab_size = vocab_size or recorded
        if self.has_vocabulary and vocab_size > recorded:
            raise ConfigError(
                f"vocab_size is {vocab_size}, but the vocabulary of the data has {recorded} ids, and a model has one "
                "row for each: leave vocab_size at 0, or build the store with another `vocabulary`"
            )
        max_id = recorded - 1 if self.has_vocabulary else self._bound_ids(vocab_size)
        if vocab_size <= max_id:
            advice = "leave it at 0" if self.has_vocabulary else f"set it to {max_id + 1} or more"
            raise ConfigError(f"vocab_size is {vocab_size}, but the data has ids up to {max_id}; {advice}")
        return self if vocab_size == recorded else TokenStore(self._prefixes, None, self.manifest, vocab_size)

    @cached_property
    def sha256(self) -> str:
        """The hash of the content: equal for the same ids and the same vocabulary, wherever the files are."""
        recorded = self.manifest.get("sha256")
        if isinstance(recorded, str):
            return recorded
        hashes = {part: hash_file(get_binidx_paths(prefix)[0]) for part, prefix in self._prefixes.items()}
        return compute_content_hash(hashes, self.tokenizer_spec)

    def has_part(self, part: str) -> bool:
        """Whether the "train" or "validation" part exists and has at least one document."""
        return part in self._prefixes and len(self.index(part)) > 0

    def index(self, part: str) -> BinIdx:
        """The documents of a part ("train" or "validation")."""
        if part not in self._prefixes:
            raise UsageError(f"this store has no {part} part, only {', '.join(self._prefixes)}")
        return self._indexes[part]

    def tokens(self, part: str) -> npt.NDArray[Any]:
        """All ids of a part as one memory-mapped array."""
        return self.index(part).tokens

    def validation_documents(self) -> Iterator[ValidationDocument]:
        """The documents of the validation part, in order. Raises DataError if their records cannot be used."""
        index = self.index("validation")
        path = self._prefixes["validation"].with_name(VALIDATION_RECORDS)
        records = _read_validation_records(path)
        if len(records) != len(index):
            counts = f"{path} describes {len(records)} documents, but {index.idx_path} has {len(index)}"
            raise DataError(f"{counts}; build the store again")
        for number, record in enumerate(records):
            ids = index[number]
            if len(ids) and ids[-1] == SEPARATOR:
                ids = ids[:-1]
            yield ValidationDocument(record["language"], record["source"], record["bytes"], ids)

    @cached_property
    def _indexes(self) -> dict[str, BinIdx]:
        return {part: BinIdx(prefix) for part, prefix in self._prefixes.items()}


def open_store(path: str | Path) -> TokenStore:
    """Open a store: a folder of `fledge data build`, or a pair X.bin, X.idx by the name X, X.bin or X.idx.

    A pair uses the World vocabulary, unless it is part of a store folder, whose vocabulary it then uses.
    Raises UsageError if there is no store, DataError if its files are damaged or inconsistent.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    for prefix in (path, path.with_name(f"{path.name}_text_document")):  # json2binidx writes the second one
        if all(file.is_file() for file in get_binidx_paths(prefix)):
            store = TokenStore({"train": prefix}, _read_sibling_spec(prefix), {})
            store.index("train")
            return store
    raise UsageError(
        f"there is no token store {path}; name a folder of `fledge data build`, or a pair of .bin and .idx files"
    )


def _open_folder(path: Path) -> TokenStore:
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"{path} contains no finished token store: it has no {MANIFEST}; run `fledge data build` to finish it"
        )
    try:
        manifest = read_json(path / MANIFEST)
        spec = read_json(path / TOKENIZER)
        sizes = {name: (path / name).stat().st_size for name in manifest["outputs"]}
        changed = [name for name, size in sizes.items() if size != manifest["outputs"][name]["bytes"]]
    except OSError as error:
        raise DataError(f"{path}: {error.filename}: {error.strerror}; build the store again") from None
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{MANIFEST} or {TOKENIZER} is damaged"
        raise DataError(f"{path}: {problem}: {error!r:.200}; build the store again") from None
    if changed:
        raise DataError(f"{path / changed[0]} does not have the size in the manifest; build the store again")
    store = TokenStore({part: path / part for part in PARTS}, spec, manifest)
    for part in PARTS:
        store.index(part)
    return store


def _read_sibling_spec(prefix: Path) -> dict[str, Any] | None:
    """The vocabulary of the finished store that contains a pair of files; None if there is none."""
    try:
        if get_binidx_paths(prefix)[0].name not in read_json(prefix.parent / MANIFEST)["outputs"]:
            return None
        return Vocabulary.from_spec(read_json(prefix.parent / TOKENIZER)).to_spec()
    except (OSError, ValueError, KeyError, TypeError, TokenizerError):
        return None  # the manifest belongs to other software


def find_damaged_files(path: Path, progress: Callable[[int, int], None]) -> Iterator[str]:
    """Names of the files in a store's folder whose hash differs from the manifest. Raises the errors of `open_store`.

    progress: called with the number of bytes read and the total.
    """
    outputs = open_store(path).manifest["outputs"]
    done, total = 0, sum(output["bytes"] for output in outputs.values())
    for name, output in outputs.items():
        progress(done, total)
        if hash_file(path / name) != output["sha256"]:
            yield name
        done += output["bytes"]


def _read_validation_records(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        assert all({"language", "source", "bytes"} <= set(record) for record in records)
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise DataError(f"{path} cannot be used: {error!r:.200}; build the store again") from None
    return records


def compute_content_hash(parts: Mapping[str, str], spec: Mapping[str, Any] | None) -> str:
    """One hash of the hashes of all .bin files and of the vocabulary. parts: part -> SHA-256 of its .bin file."""
    return hashlib.sha256(json.dumps([sorted(parts.items()), spec], sort_keys=True).encode()).hexdigest()


def choose_dtype(setting: str, vocab_size: int) -> np.dtype[Any]:
    """The type of the ids in a store for a `dtype` setting. Raises UsageError if uint16 is too small."""
    if setting == "uint16" and vocab_size > 1 << 16:
        raise UsageError(f"dtype uint16 cannot hold a vocabulary of {vocab_size} ids; use auto or int32")
    return np.dtype("<i4" if setting == "int32" or vocab_size > 1 << 16 else "<u2")
