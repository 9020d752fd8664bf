"""A token store: what training reads, for stores of any origin.

A folder of `fledge data build` holds

    train.bin, train.idx              binidx; every document followed by id 0
    validation.bin, validation.idx    the same for what no training document equals or resembles
    validation.jsonl                  language, source, bytes and tokens of each validation document
    tokenizer.json                    the vocabulary's record
    manifest.json, report.html        where everything came from

A bare pair X.bin, X.idx, made by other software, is a store without a validation part, and without a vocabulary that
anybody recorded. Here: opening either, and looking for damage. Not here: making one (build.py).
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
from fledge.data.binidx import BinIdx, files_of
from fledge.tokenizer import Vocabulary

SEPARATOR = 0  # the end-of-text id of World and of every pruned vocabulary, behind every document
PARTS = ("train", "validation")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPANS = "validation.jsonl"
WORLD = {"kind": "world"}
READ = 1 << 24  # bytes of ids at a time


@dataclass(frozen=True)
class ValidationDocument:
    """One validation document: what is known of it, and its ids without the separator."""

    language: str
    source: str
    bytes: int
    ids: npt.NDArray[Any]


class TokenStore:
    """An open store. Ids are mapped, never read whole."""

    def __init__(
        self, prefixes: Mapping[str, Path], spec: dict[str, Any] | None, manifest: dict[str, Any], rows: int = 0
    ) -> None:
        self._prefixes = prefixes
        self.tokenizer_spec = dict(WORLD) if spec is None and not rows else spec
        """The record of the vocabulary, for `fledge.tokenizer.tokenizer_for`; None where it is not known."""
        self.recorded = spec is not None
        """Whether the vocabulary is known, and not only taken to be World's."""
        self.manifest = manifest
        """What the build wrote down; empty for a bare pair of files."""
        self._rows = rows

    @cached_property
    def vocab_size(self) -> int:
        """Rows a model needs: every id is below it."""
        return Vocabulary.from_spec(self.tokenizer_spec).size if self.tokenizer_spec else self._rows

    @cached_property
    def largest(self) -> int:
        """The largest id of training. All of them are read, a block at a time. Raises DataError for one below 0."""
        index = self.index("train")
        least = most = 0
        with open(index.bin, "rb") as file:
            while len(ids := np.frombuffer(file.read(READ), dtype=index.dtype)):
                least, most = min(least, int(ids.min())), max(most, int(ids.max()))
        if least < 0:
            raise DataError(f"{index.bin} has the id {least}; an id is never below 0. Is {index.dtype.name} its type?")
        return most

    def _most(self, rows: int) -> int:
        """The largest id, or what it is at most where the type of ids has no room for `rows`."""
        dtype = self.index("train").dtype
        possible = int(np.iinfo(dtype).max)
        return possible if dtype.kind == "u" and possible < rows else self.largest

    def with_rows(self, rows: int) -> TokenStore:
        """This store for a model with this number of rows; 0: the size of the vocabulary.

        What a pair of files does not say, its user can: without a recorded vocabulary, any number above all ids will
        do, and unless that is World's, the store has no vocabulary then. Raises ConfigError for what cannot be.
        """
        size = self.vocab_size
        rows = rows or size
        if self.recorded and rows > size:
            raise ConfigError(
                f"vocab_size is {rows}, but the vocabulary of the data has {size} ids, and a model has one row "
                "for each: leave vocab_size at 0, or build the store with another `vocabulary`"
            )
        most = size - 1 if self.recorded else self._most(rows)
        if rows <= most:
            advice = "leave it at 0" if self.recorded else f"set it to {most + 1} or more"
            raise ConfigError(f"vocab_size is {rows}, but the data has ids up to {most}; {advice}")
        return self if rows == size else TokenStore(self._prefixes, None, self.manifest, rows)

    @cached_property
    def sha256(self) -> str:
        """The identity of the content: the same ids under the same vocabulary, wherever the files are."""
        known = self.manifest.get("sha256")
        if isinstance(known, str):
            return known
        hashes = {part: hash_file(files_of(prefix)[0]) for part, prefix in self._prefixes.items()}
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

    def documents(self) -> Iterator[ValidationDocument]:
        """The documents of the validation part, in order; index() has the others, with fewer facts."""
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
            yield ValidationDocument(line["language"], line["source"], line["bytes"], ids)

    @cached_property
    def _open(self) -> dict[str, BinIdx]:
        return {part: BinIdx(prefix) for part, prefix in self._prefixes.items()}


def open_store(path: str | Path) -> TokenStore:
    """The store in a folder of `fledge data build`, or of a pair X.bin, X.idx: X, X.bin or X.idx.

    The ids of a pair are taken for World's, unless the pair is in such a folder, which has the vocabulary.
    Raises UsageError where there is none, DataError for files that are damaged or do not fit each other.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    for prefix in (path, path.with_name(f"{path.name}_text_document")):  # as json2binidx names its files
        if all(file.is_file() for file in files_of(prefix)):
            store = TokenStore({"train": prefix}, _spec_beside(prefix), {})
            store.index("train")
            return store
    raise UsageError(f"there is no token store {path}: no folder of `fledge data build`, and no pair .bin and .idx")


def _folder(path: Path) -> TokenStore:
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
    store = TokenStore({part: path / part for part in PARTS}, spec, manifest)
    for part in PARTS:
        store.index(part)
    return store


def _spec_beside(prefix: Path) -> dict[str, Any] | None:
    """The vocabulary of the finished store that a pair of files is a part of, if it is one."""
    try:
        if files_of(prefix)[0].name not in read_json(prefix.parent / MANIFEST)["outputs"]:
            return None
        return Vocabulary.from_spec(read_json(prefix.parent / TOKENIZER)).to_spec()
    except (OSError, ValueError, KeyError, TypeError, TokenizerError):
        return None  # a manifest of something else


def damaged(path: Path, step: Callable[[int, int], None]) -> Iterator[str]:
    """Names of the files in a store's folder whose content is not what the build wrote. Raises as `open_store` does.

    step: called with the number of bytes read and the total.
    """
    outputs = open_store(path).manifest["outputs"]
    done, total = 0, sum(one["bytes"] for one in outputs.values())
    for name, one in outputs.items():
        step(done, total)
        if hash_file(path / name) != one["sha256"]:
            yield name
        done += one["bytes"]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        assert all({"language", "source", "bytes"} <= set(line) for line in found)
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise DataError(f"{path} cannot be used: {error!r:.200}; build the store again") from None
    return found


def identity(parts: Mapping[str, str], spec: Mapping[str, Any] | None) -> str:
    """One hash of the hashes of all .bin files and of the vocabulary."""
    return hashlib.sha256(json.dumps([sorted(parts.items()), spec], sort_keys=True).encode()).hexdigest()


def type_for(wanted: str, vocab_size: int) -> np.dtype[Any]:
    """The type of ids in a store. Raises UsageError where uint16 is too small."""
    if wanted == "uint16" and vocab_size > 1 << 16:
        raise UsageError(f"dtype uint16 cannot hold a vocabulary of {vocab_size} ids; use auto or int32")
    return np.dtype("<i4" if wanted == "int32" or vocab_size > 1 << 16 else "<u2")
