"""The configuration of `fledge data build`: a TOML file as frozen dataclasses, checked before anything is read.

Here: the settings, their defaults and limits. Not here: what is done with them.
"""

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
VOCABULARIES = "world, a number of tokens, or a .json file"
STANDARD_CLEANING = ("newlines", "nfc", "control_characters", "edges", {"min_characters": 20})


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value}; it must be from {least:g} to {most:g}")


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from: files, or a data set of the hub."""

    path: str = ""  # a file, a folder, or a pattern with * in it; from where the config file is
    hub: str = ""  # or a data set that the package `datasets` can load
    subset: str = ""  # of the data set
    split: str = "train"  # of the data set
    revision: str = ""  # of the data set: a commit, so that a later build reads the same
    format: str = ""  # jsonl, parquet or text; without it, each file's name decides
    name: str = ""  # the source of documents that name none; without it, the file's name, or the folder's for texts
    language: str = ""  # of documents that name none
    text: str = "text"  # the field with the text
    template: str = ""  # or a text made of several fields: "User: {question}\n\nAssistant: {answer}"
    language_field: str = "lang"
    source_field: str = "src"

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.hub):
            raise ConfigError("each of [[sources]] needs either a path or a hub data set")
        if self.format and self.format not in FORMATS:
            raise ConfigError(f"format {self.format!r} is unknown; formats: {', '.join(FORMATS)}")

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return self.name or self.path or self.hub


@dataclass(frozen=True)
class LanguageConfig:
    """Identification of the language of documents that have none."""

    identify: bool = True
    characters: int = 1000  # of a document that are looked at

    def __post_init__(self) -> None:
        _within("languages.characters", self.characters, 20, 10**6)


@dataclass(frozen=True)
class DedupConfig:
    """Which copies are left out."""

    exact: bool = True  # texts that are equal but for case and ASCII white space
    near: bool = True  # texts that share most of their pieces
    threshold: float = 0.8  # share of pieces in common (Jaccard) from which two texts count as one
    permutations: int = 128  # numbers in a signature; more are more exact, and slower
    characters: int = 16  # of a piece

    def __post_init__(self) -> None:
        _within("dedup.threshold", self.threshold, 0.3, 1.0)
        _within("dedup.permutations", self.permutations, 16, 1024)
        _within("dedup.characters", self.characters, 2, 256)


@dataclass(frozen=True)
class ValidationConfig:
    """Documents kept aside, chosen by their own hash, language by language."""

    share: float = 0.01  # of a language's documents; 0: none at all
    documents: int = 3  # but at least about this many, and at most a quarter of all
    bytes: ByteSize = 100_000  # and no more than this a language; one document gives a quarter of it at most

    def __post_init__(self) -> None:
        _within("validation.share", self.share, 0.0, 0.9)
        _within("validation.documents", self.documents, 0, 10**9)
        _within("validation.bytes", self.bytes, 0, 10**12)

    @property
    def wanted(self) -> bool:
        """Whether any document is to be kept aside."""
        return self.share > 0 and self.bytes > 0


@dataclass(frozen=True)
class MixtureGroup:
    """A part of the mixture. A document belongs to the first group that its language and source fit."""

    name: str
    languages: tuple[str, ...] = ("*",)  # with * for anything: "code:*"
    sources: tuple[str, ...] = ("*",)
    weight: float = 0.0  # share of the text, as against the other groups with a weight; 0: all there is
    epochs: float = 1.0  # how often a document may be repeated; 0.5 takes half of them
    max_bytes: ByteSize = 0  # at most so much text; 0: no limit

    def __post_init__(self) -> None:
        for name in ("weight", "epochs", "max_bytes"):
            _within(f"{name} of group {self.name}", getattr(self, name), 0, 10**15)
        if self.weight and not self.epochs:
            raise ConfigError(f"epochs of group {self.name} is 0, but it has a weight; leave one of them out")
        for name in ("languages", "sources"):
            if not getattr(self, name):
                raise ConfigError(f'{name} of group {self.name} is empty, so no document fits it; ["*"] fits all')


@dataclass(frozen=True)
class MixtureConfig:
    """How much of what. Documents that fit no group are left out."""

    groups: tuple[MixtureGroup, ...] = (MixtureGroup("all"),)
    total_bytes: ByteSize = 0  # of all groups with a weight, at most
    source_bytes: Mapping[str, ByteSize] = field(default_factory=dict)  # of one source, in each group

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ConfigError("two groups of the mixture have the same name")
        _within("mixture.total_bytes", self.total_bytes, 0, 10**18)
        for source, most in self.source_bytes.items():
            _within(f"mixture.source_bytes of {source}", most, 1, 10**18)
        if not self.groups:
            raise ConfigError("mixture.groups is empty, so every document is left out; leave it out to take them all")
        if not any(group.epochs for group in self.groups):
            raise ConfigError("epochs is 0 in every group of the mixture, so every document is left out")
        if self.total_bytes and not any(group.weight for group in self.groups):
            raise ConfigError("mixture.total_bytes needs groups with a weight; use max_bytes for each group instead")


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides what a token store holds."""

    sources: tuple[SourceConfig, ...]
    clean: tuple[Any, ...] = STANDARD_CLEANING  # names of steps, or {name = limit}; see `fledge data steps`
    languages: LanguageConfig = LanguageConfig()
    dedup: DedupConfig = DedupConfig()
    validation: ValidationConfig = ValidationConfig()
    mixture: MixtureConfig = MixtureConfig()
    vocabulary: Annotated[str | int, VOCABULARIES] = "world"  # a number N: the N most used tokens
    dtype: str = "auto"  # of the ids in the store: uint16, or int32
    cut_characters: int = 200_000  # longer documents become several; 0: never
    piece_bytes: ByteSize = 16_000_000  # of input that one worker takes at a time
    on_error: str = "stop"  # at a line that is no document; "skip" counts it and goes on
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("the config has no [[sources]]")
        if self.on_error not in ("stop", "skip"):
            raise ConfigError(f"on_error {self.on_error!r} is unknown; it is stop or skip")
        if self.dtype not in ("auto", "uint16", "int32"):
            raise ConfigError(f"dtype {self.dtype!r} is unknown; it is auto, uint16 or int32")
        _within("piece_bytes", self.piece_bytes, 1, 10**12)
        if self.cut_characters:
            _within("cut_characters", self.cut_characters, 100, 10**9)
        if isinstance(self.vocabulary, int):
            _within("vocabulary", self.vocabulary, 257, 65536)
        elif self.vocabulary != "world" and not self.vocabulary.endswith(".json"):
            raise ConfigError(f"vocabulary {self.vocabulary!r} is unknown; it is {VOCABULARIES}")


def read_config(path: Path) -> BuildConfig:
    """The config of a TOML file. Raises ConfigError with the file's name for whatever is wrong in it."""
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
            f"{path} is no config: a config is a TOML file that names its data, path = {path.name!r} under [[sources]]"
        ) from None


def build_config(values: Mapping[str, Any]) -> BuildConfig:
    """A config of plain values, as TOML has them."""
    return from_dict(BuildConfig, values)
