"""The TOML config of a build: valid values are read, invalid ones give an error that names the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fledge.core.errors import ConfigError
from fledge.data.pipeline.config import MixtureGroup, build_config, read_config

FULL_CONFIG = """
seed = 7
vocabulary = 8192
cut_characters = 0
clean = ["newlines", {min_letters = 0.3}]

[[sources]]
path = "books/*.jsonl"
language = "en"

[[sources]]
hub = "some/data"
template = "Q: {question}"

[languages]
identify = false

[dedup]
threshold = 1

[validation]
bytes = "50 KB"

[mixture]
total_bytes = "1.5GB"
source_bytes = {"reference/dict" = "2MB"}

[[mixture.groups]]
name = "english"
languages = ["en"]
weight = 70

[[mixture.groups]]
name = "code"
languages = ["code:*"]
weight = 30
epochs = 2
max_bytes = "10MiB"
"""


def test_reads_every_section(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(FULL_CONFIG)
    config = read_config(tmp_path / "c.toml")
    assert (config.seed, config.vocabulary, config.cut_characters) == (7, 8192, 0)
    assert config.clean == ("newlines", {"min_letters": 0.3})
    assert [source.label for source in config.sources] == ["books/*.jsonl", "some/data"]
    assert not config.languages.identify and config.dedup.threshold == 1.0 and config.validation.bytes == 50_000
    assert config.mixture.total_bytes == 1_500_000_000 and config.mixture.source_bytes == {"reference/dict": 2_000_000}
    assert config.mixture.groups[1] == MixtureGroup("code", ("code:*",), weight=30.0, epochs=2.0, max_bytes=10 * 2**20)


MINIMAL = {"sources": [{"path": "x"}]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs sources"),
        ({"sources": []}, r"no \[\[sources\]\]"),
        ({"sources": "x"}, r"sources must be tables under \[\[sources\]\], not 'x'"),
        ({"sources": [{}]}, "either a path or a hub"),
        ({"sources": [{"path": "x", "hub": "y"}]}, "either a path or a hub"),
        ({"sources": [{"pth": "x"}]}, "no setting 'pth'; did you mean 'path'"),
        ({"sources": [{"path": 5}]}, "sources.path must be a str, not 5"),
        ({"sources": [{"path": "x", "format": "csv"}]}, "format 'csv' is unknown"),
        ({**MINIMAL, "sed": 1}, "no setting 'sed'; did you mean 'seed'"),
        ({**MINIMAL, "seed": "1"}, "seed must be a whole number, not '1'"),
        ({**MINIMAL, "seed": True}, "seed must be a whole number"),
        ({**MINIMAL, "vocabulary": "worlds"}, "vocabulary 'worlds' is unknown"),
        ({**MINIMAL, "vocabulary": 256}, "vocabulary is 256; it must be from 257 to 65536"),
        ({**MINIMAL, "vocabulary": 1.5}, "vocabulary must be world"),
        ({**MINIMAL, "dtype": "uint8"}, "dtype 'uint8' is unknown"),
        ({**MINIMAL, "on_error": "go"}, "on_error 'go' is unknown"),
        ({**MINIMAL, "clean": "nfc"}, "clean must be a list"),
        ({**MINIMAL, "dedup": {"threshold": 0.1}}, "dedup.threshold is 0.1"),
        ({**MINIMAL, "dedup": 5}, "dedup must be a table"),
        ({**MINIMAL, "piece_bytes": "16 parsecs"}, "piece_bytes must be a size"),
        ({**MINIMAL, "piece_bytes": "1.2.3MB"}, "piece_bytes must be a size"),
        ({**MINIMAL, "languages": {"identify": 1}}, "languages.identify must be a bool"),
        ({**MINIMAL, "validation": {"share": 2}}, "validation.share is 2"),
        ({**MINIMAL, "mixture": {"groups": [{"weight": 1}]}}, "Group needs name"),
        ({**MINIMAL, "mixture": {"groups": [{"name": "a"}, {"name": "a"}]}}, "same name"),
        ({**MINIMAL, "mixture": {"groups": [{"name": "a", "languages": [1]}]}}, "languages must be a list of texts"),
        ({**MINIMAL, "mixture": {"groups": [{"name": "a", "weight": -1}]}}, "weight of group a is -1"),
        ({**MINIMAL, "mixture": {"total_bytes": "1GB"}}, "needs groups with a weight"),
        ({**MINIMAL, "mixture": {"source_bytes": {"a": "x"}}}, "source_bytes of a must be a size"),
        ({**MINIMAL, "mixture": {"source_bytes": {"a": -1}}}, "mixture.source_bytes of a is -1"),
        ({**MINIMAL, "mixture": {"total_bytes": -1}}, "mixture.total_bytes is -1"),
        ({**MINIMAL, "mixture": {"groups": []}}, "mixture.groups is empty"),
        ({**MINIMAL, "mixture": {"groups": [{"name": "a", "epochs": 0}]}}, "epochs is 0 in every group"),
        ({**MINIMAL, "mixture": {"groups": [{"name": "a", "epochs": 0, "weight": 1}]}}, "epochs of group a is 0, but"),
        ({**MINIMAL, "mixture": {"groups": [{"name": "a", "sources": []}]}}, "sources of group a is empty"),
        ({**MINIMAL, "dedup": {"threshold": 1.5}}, "dedup.threshold is 1.5"),
        ({**MINIMAL, "validation": {"share": -0.1}}, "validation.share is -0.1"),
        ({**MINIMAL, "validation": {"documents": -1}}, "validation.documents is -1"),
        ({**MINIMAL, "languages": {"characters": 0}}, "languages.characters is 0"),
        ({**MINIMAL, "cut_characters": -5}, "cut_characters is -5; it must be from 100"),
        ({**MINIMAL, "cut_characters": 3}, "cut_characters is 3; it must be from 100"),
    ],
)
def test_invalid_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(values)


def test_files_that_are_not_a_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("seed = = 1")
    (tmp_path / "b.toml").write_bytes(b"\xff")
    (tmp_path / "c.toml").write_text("seed = 1")
    for name, message in (("a", r"a\.toml: Invalid"), ("b", r"b\.toml: "), ("c", r"c\.toml: .*needs sources")):
        with pytest.raises(ConfigError, match=message):
            read_config(tmp_path / f"{name}.toml")
    (tmp_path / "x.parquet").write_bytes(b"PAR1\xff")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}')
    for name in ("x.parquet", "x.jsonl"):
        with pytest.raises(ConfigError, match=rf"{name} is not a config; write a TOML file with path = '{name}'"):
            read_config(tmp_path / name)
    with pytest.raises(ConfigError, match="there is no config"):
        read_config(tmp_path / "d.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)
