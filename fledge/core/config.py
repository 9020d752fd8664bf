"""TOML and JSON values as dataclasses: unknown and missing keys are errors, and every value has its field's type."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from fledge.core.errors import ConfigError

T = TypeVar("T")

ByteSize = Annotated[int, 'a size such as 34000000 or "34MB"']
"""A field with a number of bytes, also as a text with a unit. The text in Annotated describes what a field takes."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TYPE_NAMES = {int: "a whole number", str: "a str", float: "a float", bool: "a bool"}


def from_dict(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Build dataclass `cls`, with the dataclasses in its fields, from a table.

    Lists become tuples if the field is a tuple, and whole numbers become floats if it is a float. prefix: of the names
    in messages. Raises ConfigError for an unknown key, a missing key, and a value of another type.
    """
    check_keys(cls, values)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    missing = [
        field.name
        for field in fields
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}")
    kinds = typing.get_type_hints(cls, include_extras=True)
    return cls(**{name: coerce_value(kinds[name], value, prefix + name) for name, value in values.items()})


def check_keys(cls: type[Any], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that is no field of dataclass `cls`."""
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            similar = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {similar[0]!r}?" if similar else f"known keys: {', '.join(sorted(names))}"
            raise ConfigError(f"{cls.__name__} has no setting {key!r}; {hint}")


def coerce_value(kind: Any, value: Any, name: str) -> Any:
    """Convert a TOML or JSON value to a field's type. Raises ConfigError, with the setting's `name`."""
    if kind == ByteSize and isinstance(value, str):
        return _parse_size(value, name)
    if kind is float and type(value) is int:
        return _to_float(value, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (tuple, list):
        return origin(_coerce_items(arguments[0], value, name))
    if dataclasses.is_dataclass(kind) or origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a table, not {value!r:.60}")
        if dataclasses.is_dataclass(kind):
            return from_dict(typing.cast(type[Any], kind), value, f"{name}.")
        return {key: coerce_value(arguments[1], item, f"{name} of {key}") for key, item in value.items()}
    if not _is_instance(arguments[0] if origin is Annotated else kind, value):
        wanted = arguments[1] if origin is Annotated else TYPE_NAMES.get(kind, _describe(kind))
        raise ConfigError(f"{name} must be {wanted}, not {value!r:.60}")
    return value


def parse_text(kind: Any, text: str, name: str) -> Any:
    """Convert a command-line argument to a field's type: a bool, int, float, str or one of them or None."""
    kinds = _get_alternatives(kind)
    if text.lower() == "none" and types.NoneType in kinds:
        return None
    try:
        if bool in kinds:
            return {"true": True, "false": False}[text.lower()]
        if int in kinds:
            return int(text.replace("_", ""))
        return float(text) if float in kinds else text
    except (KeyError, ValueError):
        raise ConfigError(f"{name} is {text!r}; it must be {_describe(kind)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file. Raises ConfigError if it cannot be read or is not TOML."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _coerce_items(kind: Any, value: Any, name: str) -> list[Any]:
    if dataclasses.is_dataclass(kind):
        if not (isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)):
            raise ConfigError(f"{name} must be tables under [[{name}]], not {value!r:.60}")
    elif not isinstance(value, list | tuple) or (kind is str and not all(isinstance(item, str) for item in value)):
        raise ConfigError(f"{name} must be a list{' of texts' if kind is str else ''}, not {value!r:.60}")
    return [coerce_value(kind, item, name) for item in value]


def _to_float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name} is too large for a float") from None


def _parse_size(text: str, name: str) -> int:
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-z]*?)B?\s*", text, re.I)
    unit = match[2].upper() + "B" if match and match[2] else ""
    try:
        if match is None or unit not in UNITS:
            raise ValueError
        return round(float(match[1]) * UNITS[unit])
    except ValueError:
        raise ConfigError(f"{name} must be {typing.get_args(ByteSize)[1]}, not {text!r:.60}") from None


def _get_alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union; any other type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _is_instance(kind: Any, value: Any) -> bool:
    """Whether a value has exactly one of the types of `kind`: True is no int."""
    kinds = _get_alternatives(kind)
    return Any in kinds or type(value) in kinds


def _describe(kind: Any) -> str:
    return " or ".join("none" if one is types.NoneType else one.__name__ for one in _get_alternatives(kind))
