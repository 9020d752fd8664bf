"""Built-in configs: they are valid, and world-v2 has the published proportions."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.core.errors import UsageError
from fledge.data.pipeline.builtin_configs import BUILTIN_CONFIGS, find_config
from fledge.data.pipeline.clean import make_steps
from fledge.data.pipeline.config import read_config
from fledge.data.pipeline.mixture.groups import find_group


@pytest.mark.parametrize("name", BUILTIN_CONFIGS)
def test_builtin_configs_are_valid(name: str) -> None:
    config = read_config(find_config(name))
    assert make_steps(config.clean) and all(source.hub for source in config.sources)


def test_world_v2_has_the_published_proportions() -> None:
    config = read_config(find_config("world-v2"))
    weights = {group.name: group.weight for group in config.mixture.groups}
    assert weights == {"english": 70, "multilingual": 15, "code": 15}
    names = [group.name for group in config.mixture.groups]
    expected = {"en": "english", "zh": "multilingual", "code:c": "code", "code": "code", "": "multilingual"}
    for language, name in expected.items():
        assert names[find_group(config.mixture, language, "any")] == name
    languages = {source.language for source in config.sources}
    assert {"en", "zh", "ja", "code"} <= languages


def test_a_file_has_priority_over_a_builtin_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "world-v2").write_text("")
    assert find_config("world-v2") == Path("world-v2")
    with pytest.raises(UsageError, match="there is no config none"):
        find_config("none")
