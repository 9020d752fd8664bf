"""Dicts to dataclasses, strictly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import pytest

from fledge.core.config import from_dict
from fledge.core.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    width: int
    layers: int
    name: str = "plain"
    tags: list[str] = field(default_factory=list)


def test_there_and_back() -> None:
    settings = Settings(3, 4, tags=["a"])
    assert from_dict(Settings, asdict(settings)) == settings
    assert from_dict(Settings, {"width": 1, "layers": 2}) == Settings(1, 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 1, "layers": 2, "nmae": "x"}, "Settings has no setting 'nmae'; did you mean 'name'"),
        ({"width": 1, "layers": 2, "zzz": 0}, "known keys: layers, name, tags, width"),
        ({"name": "x"}, "Settings needs width, layers"),
    ],
)
def test_unknown_and_missing_keys_are_errors(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_dict(Settings, values)
