"""The configuration of `fledge data build`: a TOML file as frozen dataclasses, validated before any data is read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fledge.core.config import ByteSize, from_dict
from fledge.core.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMATS = ("jsonl", "parquet", "text")
VOCABULARY_VALUES = "world, a number of tokens, or a .json file"
DEFAULT_CLEANING = ("newlines", "nfc", "control_characters", "edges", {"min_characters": 20})


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must be from {low:g} to {high:g}")


@dataclass(frozen=True)
class SourceConfig:
    """A source of documents: files, or a data set of the hub."""

    path: str = ""  # a file, a folder, or a pattern with *; relative to the folder of the config file
    hub: str = ""  # alternative to `path`: a data set for the package `datasets`
    subset: str = ""  # subset of the data set
    split: str = "train"  # split of the data set
    revision: str = ""  # commit of the data set, so that a later build reads the same documents
    format: str = ""  # jsonl, parquet or text; empty: chosen by the suffix of each file
    name: str = ""  # the source of documents without one; empty: the file name, or the folder name for texts
    language: str = ""  # the language of documents without one
    text: str = "text"  # the field with the text
    template: str = ""  # alternative to `text`: several fields in one text: "User: {question}\n\nAssistant: {answer}"
    language_field: str = "lang"
    source_field: str = "src"

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.hub):
            raise ConfigError("each entry of [[sources]] needs either a path or a hub data set")
        if self.format and self.format not in FORMATS:
            raise ConfigError(f"format {self.format!r} is unknown; formats: {', '.join(FORMATS)}")

    @property
    def label(self) -> str:
        """The name of the source in messages."""
        return self.name or self.path or self.hub


@dataclass(frozen=True)
class LanguageConfig:
    """Language identification of documents without a language."""

    identify: bool = True
    characters: int = 1000  # number of characters at the start of a document that are examined

    def __post_init__(self) -> None:
        _check_range("languages.characters", self.characters, 20, 10**6)


@dataclass(frozen=True)
class DedupConfig:
    """Which duplicates are dropped."""

    exact: bool = True  # drop texts that are equal except for case and ASCII white space
    near: bool = True  # drop texts that share most of their shingles
    threshold: float = 0.8  # Jaccard similarity of the shingles at which two texts are duplicates
    permutations: int = 128  # length of a MinHash signature; more is more accurate and slower
    characters: int = 16  # length of a shingle

    def __post_init__(self) -> None:
        _check_range("dedup.threshold", self.threshold, 0.3, 1.0)
        _check_range("dedup.permutations", self.permutations, 16, 1024)
        _check_range("dedup.characters", self.characters, 2, 256)


@dataclass(frozen=True)
class ValidationConfig:
    """The held-out documents, chosen by their hash, for each language."""

    share: float = 0.01  # share of the documents of a language; 0: none
    documents: int = 3  # at least about this many, but at most a quarter of the documents
    bytes: ByteSize = 100_000  # at most this much text of a language; at most a quarter of it from one document

    def __post_init__(self) -> None:
        _check_range("validation.share", self.share, 0.0, 0.9)
        _check_range("validation.documents", self.documents, 0, 10**9)
        _check_range("validation.bytes", self.bytes, 0, 10**12)

    @property
    def is_enabled(self) -> bool:
        """Whether the settings ask for held-out documents."""
        return self.share > 0 and self.bytes > 0


@dataclass(frozen=True)
class MixtureGroup:
    """A part of the mixture. A document belongs to the first group that matches its language and source."""

    name: str
    languages: tuple[str, ...] = ("*",)  # patterns with *, such as "code:*"
    sources: tuple[str, ...] = ("*",)
    weight: float = 0.0  # share of the text relative to the other weighted groups; 0: all documents
    epochs: float = 1.0  # how often a document may be repeated; 0.5: half of the documents
    max_bytes: ByteSize = 0  # at most this much text; 0: no limit

    def __post_init__(self) -> None:
        for name in ("weight", "epochs", "max_bytes"):
            _check_range(f"{name} of group {self.name}", getattr(self, name), 0, 10**15)
        if self.weight and not self.epochs:
            raise ConfigError(f"epochs of group {self.name} is 0, but it has a weight; remove one of them")
        for name in ("languages", "sources"):
            if not getattr(self, name):
                raise ConfigError(f'{name} of group {self.name} is empty, so no document matches; ["*"] matches all')


@dataclass(frozen=True)
class MixtureConfig:
    """How much text of each group the store contains. Documents without a group are omitted."""

    groups: tuple[MixtureGroup, ...] = (MixtureGroup("all"),)
    total_bytes: ByteSize = 0  # limit for all weighted groups together; 0: no limit
    source_bytes: Mapping[str, ByteSize] = field(default_factory=dict)  # source -> limit in each group

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ConfigError("two groups of the mixture have the same name")
        _check_range("mixture.total_bytes", self.total_bytes, 0, 10**18)
        for source, limit in self.source_bytes.items():
            _check_range(f"mixture.source_bytes of {source}", limit, 1, 10**18)
        if not self.groups:
            raise ConfigError("mixture.groups is empty, so no document is used; remove the setting to use all")
        if not any(group.epochs for group in self.groups):
            raise ConfigError("epochs is 0 in every group of the mixture, so no document is used")
        if self.total_bytes and not any(group.weight for group in self.groups):
            raise ConfigError("mixture.total_bytes needs groups with a weight; use max_bytes for each group instead")


@dataclass(frozen=True)
class BuildConfig:
    """All settings that determine the content of a token store."""

    sources: tuple[SourceConfig, ...]
    clean: tuple[Any, ...] = DEFAULT_CLEANING  # step names, or {name = limit}; see `fledge data steps`
    languages: LanguageConfig = LanguageConfig()
    dedup: DedupConfig = DedupConfig()
    validation: ValidationConfig = ValidationConfig()
    mixture: MixtureConfig = MixtureConfig()
    vocabulary: Annotated[str | int, VOCABULARY_VALUES] = "world"  # a number N: the N most used World tokens
    dtype: str = "auto"  # type of the ids in the store: auto, uint16 or int32
    cut_characters: int = 200_000  # longer documents are split; 0: never
    piece_bytes: ByteSize = 16_000_000  # input of one task of a worker
    on_error: str = "stop"  # at an invalid line; "skip" counts and omits it
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("the config has no [[sources]]")
        if self.on_error not in ("stop", "skip"):
            raise ConfigError(f"on_error {self.on_error!r} is unknown; it is stop or skip")
        if self.dtype not in ("auto", "uint16", "int32"):
            raise ConfigError(f"dtype {self.dtype!r} is unknown; it is auto, uint16 or int32")
        _check_range("piece_bytes", self.piece_bytes, 1, 10**12)
        if self.cut_characters:
            _check_range("cut_characters", self.cut_characters, 100, 10**9)
        if isinstance(self.vocabulary, int):
            _check_range("vocabulary", self.vocabulary, 257, 65536)
        elif self.vocabulary != "world" and not self.vocabulary.endswith(".json"):
            raise ConfigError(f"vocabulary {self.vocabulary!r} is unknown; it is {VOCABULARY_VALUES}")


def read_config(path: Path) -> BuildConfig:
    """The config of a TOML file. Raises ConfigError with the name of the file if it is invalid."""
    try:
        with open(path, "rb") as file:
            return build_config(tomllib.load(file))
    except FileNotFoundError:
        raise ConfigError(f"there is no config {path}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if path.suffix == ".toml":
            raise ConfigError(f"{path}: {error}") from None
        raise ConfigError(
            f"{path} is not a config; write a TOML file with path = {path.name!r} under [[sources]]"
        ) from None


def build_config(values: Mapping[str, Any]) -> BuildConfig:
    """The config of plain values, as in a TOML file."""
    return from_dict(BuildConfig, values)
