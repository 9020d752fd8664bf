"""Packaged configs: they parse, and say what their corpus is known for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.core.errors import UsageError
from fledge.data.pipeline.builtin_configs import BUILTIN_CONFIGS, find_config
from fledge.data.pipeline.clean import steps
from fledge.data.pipeline.config import read_config
from fledge.data.pipeline.mixture.groups import group_of


@pytest.mark.parametrize("name", BUILTIN_CONFIGS)
def test_recipes_are_configs(name: str) -> None:
    config = read_config(find_config(name))
    assert steps(config.clean) and all(source.hub for source in config.sources)


def test_world_is_seventy_fifteen_fifteen() -> None:
    config = read_config(find_config("world-v2"))
    weights = {group.name: group.weight for group in config.mixture.groups}
    assert weights == {"english": 70, "multilingual": 15, "code": 15}
    names = [group.name for group in config.mixture.groups]
    expected = {"en": "english", "zh": "multilingual", "code:c": "code", "code": "code", "": "multilingual"}
    for language, name in expected.items():
        assert names[group_of(config.mixture, language, "any")] == name
    given = {source.language for source in config.sources}
    assert {"en", "zh", "ja", "code"} <= given


def test_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "world-v2").write_text("")
    assert find_config("world-v2") == Path("world-v2")
    with pytest.raises(UsageError, match="there is no config none"):
        find_config("none")
