"""Public names of the package: every name can be imported, and the version is that of the project file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fledge

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", fledge.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(fledge, name) is not None
    assert name in dir(fledge)


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'fledge' has no attribute 'laod'"):
        _ = fledge.laod


def test_version_matches_project_file() -> None:
    loaded = re.search(r'^version = "(.+)"$', (REPO / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert loaded is not None and loaded[1] == fledge.__version__
