"""Dataclasses from TOML and JSON tables: keys, types, nesting and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from fledge.core.config import ByteSize, from_dict, parse_text, read_toml
from fledge.core.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    width: int
    layers: int
    name: str = "plain"
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    rate: float = 1.0
    is_open: bool = False


@dataclass(frozen=True)
class Nested:
    part: Part = Part()
    parts: tuple[Part, ...] = ()
    names: tuple[str, ...] = ()
    size: ByteSize = 0
    limits: Mapping[str, ByteSize] = field(default_factory=dict)
    choice: Annotated[str | int, "a name or a number"] = ""
    steps: tuple[Any, ...] = ()
    window: int | None = None


def test_a_dataclass_survives_a_round_trip() -> None:
    settings = Settings(3, 4, tags=["a"])
    assert from_dict(Settings, asdict(settings)) == settings
    assert from_dict(Settings, {"width": 1, "layers": 2}) == Settings(1, 2)


def test_values_get_the_types_of_their_fields() -> None:
    values = {
        "part": {"rate": 2},
        "parts": [{"is_open": True}, {}],
        "names": ["a", "b"],
        "size": "1.5 kB",
        "limits": {"x": "2MiB", "y": 3},
        "choice": 7,
        "steps": ["a", {"b": 1}],
        "window": None,
    }
    assert from_dict(Nested, values) == Nested(
        part=Part(2.0),
        parts=(Part(is_open=True), Part()),
        names=("a", "b"),
        size=1500,
        limits={"x": 2 << 20, "y": 3},
        choice=7,
        steps=("a", {"b": 1}),
    )
    assert type(from_dict(Part, {"rate": 2}).rate) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 1, "layers": 2, "nmae": "x"}, "Settings has no setting 'nmae'; did you mean 'name'"),
        ({"width": 1, "layers": 2, "zzz": 0}, "known keys: layers, name, tags, width"),
        ({"name": "x"}, "Settings needs width, layers"),
        ({"width": True, "layers": 2}, "width must be a whole number, not True"),
        ({"width": 1, "layers": 2.0}, r"layers must be a whole number, not 2\.0"),
        ({"width": 1, "layers": 2, "name": 3}, "name must be a str, not 3"),
        ({"width": 1, "layers": 2, "tags": [1]}, r"tags must be a list of texts, not \[1\]"),
    ],
)
def test_mistakes(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Settings, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"part": 5}, "part must be a table, not 5"),
        ({"part": {"rate": "x"}}, r"part\.rate must be a float, not 'x'"),
        ({"part": {"rate": 10**400}}, r"part\.rate is too large for a float"),
        ({"part": {"rat": 1}}, "Part has no setting 'rat'; did you mean 'rate'"),
        ({"parts": {"rate": 1}}, r"parts must be tables under \[\[parts\]\]"),
        ({"parts": [{"is_open": 1}]}, r"parts\.is_open must be a bool, not 1"),
        ({"size": "3 parsecs"}, "size must be a size such as 34000000 or \"34MB\", not '3 parsecs'"),
        ({"size": 1.5}, r"size must be a size such as 34000000 or \"34MB\", not 1\.5"),
        ({"limits": {"x": "y"}}, "limits of x must be a size"),
        ({"choice": 1.5}, r"choice must be a name or a number, not 1\.5"),
        ({"window": "x"}, "window must be int or none, not 'x'"),
    ],
)
def test_mistakes_in_nested_tables(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Nested, values)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "2_000", 2000),
        (int | None, "None", None),
        (int | None, "3", 3),
        (float, "3e-4", 3e-4),
        (bool, "True", True),
        (str, "none", "none"),
    ],
)
def test_texts_become_values(kind: Any, text: str, value: object) -> None:
    assert parse_text(kind, text, "x") == value


@pytest.mark.parametrize(
    ("kind", "text", "wanted"), [(int, "1.5", "int"), (int | None, "x", "int or none"), (bool, "yes", "bool")]
)
def test_other_texts_are_refused(kind: Any, text: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"x is '{text}'; it must be {wanted}$"):
        parse_text(kind, text, "x")


def test_toml_files(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("a = 1\n[b]\nc = 'd'\n")
    assert read_toml(path) == {"a": 1, "b": {"c": "d"}}
    path.write_text("a = \n")
    with pytest.raises(ConfigError, match=r"x\.toml is not TOML: .*line 1"):
        read_toml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path / "y.toml")
