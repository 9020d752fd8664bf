"""A token store: what training reads, whoever made it.

A folder of `fledge data build` holds

    train.bin, train.idx              binidx; every document followed by id 0
    validation.bin, validation.idx    the same for what no training document equals or resembles
    validation.jsonl                  language, source, bytes and tokens of each validation document
    tokenizer.json                    the vocabulary's record
    manifest.json, report.html        where everything came from

A bare pair X.bin, X.idx, made by other software, is a store without a validation part. Here: opening either. Not here:
making one (build.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fledge.core.errors import DataError, UsageError
from fledge.core.files import read_json, sha256
from fledge.data.binidx import BinIdx, files_of
from fledge.tokenizer import Vocabulary, world_vocabulary

SEPARATOR = 0  # the end-of-text id of World and of every pruned vocabulary, behind every document
PARTS = ("train", "validation")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPANS = "validation.jsonl"


@dataclass(frozen=True)
class Span:
    """One validation document: what is known of it, and its ids without the separator."""

    language: str
    source: str
    bytes: int
    ids: npt.NDArray[Any]


class Store:
    """An open store. Ids are mapped, never read whole."""

    def __init__(self, prefixes: Mapping[str, Path], spec: dict[str, Any], manifest: dict[str, Any]) -> None:
        self._prefixes = prefixes
        self.tokenizer_spec = spec
        """The record of the vocabulary, for `fledge.tokenizer.tokenizer_for`."""
        self.manifest = manifest
        """What the build wrote down; empty for a bare pair of files."""

    @cached_property
    def vocab_size(self) -> int:
        """Rows a model needs: every id is below it."""
        return Vocabulary.from_spec(self.tokenizer_spec).size

    @cached_property
    def sha256(self) -> str:
        """The identity of the content: the same ids under the same vocabulary, wherever the files are."""
        known = self.manifest.get("sha256")
        if isinstance(known, str):
            return known
        hashes = {part: sha256(files_of(prefix)[0]) for part, prefix in self._prefixes.items()}
        return identity(hashes, self.tokenizer_spec)

    def has(self, part: str) -> bool:
        """Whether there is a "train" or "validation" part with at least one document."""
        return part in self._prefixes and len(self.index(part)) > 0

    def index(self, part: str) -> BinIdx:
        """The documents of a part."""
        if part not in self._prefixes:
            raise UsageError(f"this store has no {part} part, only {', '.join(self._prefixes)}")
        return self._open[part]

    def tokens(self, part: str) -> npt.NDArray[Any]:
        """All ids of a part in one array, mapped."""
        return self.index(part).tokens

    def documents(self) -> Iterator[Span]:
        """The documents of the validation part, in order; the others, of which less is known, are in index()."""
        index = self.index("validation")
        place = self._prefixes["validation"].with_name(SPANS)
        lines = _lines(place)
        if len(lines) != len(index):
            count = f"{place} describes {len(lines)} documents, {index.idx} has {len(index)}"
            raise DataError(f"{count}; build the store again")
        for number, line in enumerate(lines):
            ids = index[number]
            if len(ids) and ids[-1] == SEPARATOR:
                ids = ids[:-1]
            yield Span(line["language"], line["source"], line["bytes"], ids)

    @cached_property
    def _open(self) -> dict[str, BinIdx]:
        return {part: BinIdx(prefix) for part, prefix in self._prefixes.items()}


def open_store(path: str | Path) -> Store:
    """The store in a folder of `fledge data build`, or of a pair X.bin, X.idx (ids of World): X, X.bin or X.idx.

    Raises UsageError where there is none, DataError for files that are damaged or do not fit each other.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    for prefix in (path, path.with_name(f"{path.name}_text_document")):  # as json2binidx names its files
        if all(file.is_file() for file in files_of(prefix)):
            store = Store({"train": prefix}, world_vocabulary().to_spec(), {})
            store.index("train")
            return store
    raise UsageError(f"there is no token store {path}: no folder of `fledge data build`, and no pair .bin and .idx")


def _folder(path: Path) -> Store:
    if not (path / MANIFEST).is_file():
        raise UsageError(f"{path} holds no finished token store: it has no {MANIFEST}; run `fledge data build` (again)")
    try:
        manifest = read_json(path / MANIFEST)
        spec = read_json(path / TOKENIZER)
        outputs = {name: (path / name).stat().st_size for name in manifest["outputs"]}
        wrong = [name for name, size in outputs.items() if size != manifest["outputs"][name]["bytes"]]
    except OSError as error:
        raise DataError(f"{path}: {error.filename}: {error.strerror}; build the store again") from None
    except (ValueError, KeyError, TypeError) as error:
        what = f"{MANIFEST} or {TOKENIZER} is damaged"
        raise DataError(f"{path}: {what}: {error!r:.200}; build the store again") from None
    if wrong:
        raise DataError(f"{path / wrong[0]} has not the size that the manifest records; build the store again")
    store = Store({part: path / part for part in PARTS}, spec, manifest)
    for part in PARTS:
        store.index(part)
    return store


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        assert all({"language", "source", "bytes"} <= set(line) for line in found)
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise DataError(f"{path} cannot be used: {error!r:.200}; build the store again") from None
    return found


def identity(parts: Mapping[str, str], spec: Mapping[str, Any]) -> str:
    """One hash of the hashes of all .bin files and of the vocabulary."""
    return hashlib.sha256(json.dumps([sorted(parts.items()), spec], sort_keys=True).encode()).hexdigest()


def type_for(wanted: str, vocab_size: int) -> np.dtype[Any]:
    """The type of ids in a store. Raises UsageError where uint16 is too small."""
    if wanted == "uint16" and vocab_size > 1 << 16:
        raise UsageError(f"dtype uint16 cannot hold a vocabulary of {vocab_size} ids; use auto or int32")
    return np.dtype("<i4" if wanted == "int32" or vocab_size > 1 << 16 else "<u2")
