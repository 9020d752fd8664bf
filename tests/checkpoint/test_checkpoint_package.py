"""The room's door: its names load on use, and none of them can be hidden by a module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fledge.checkpoint

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", fledge.checkpoint.__all__)
def test_every_public_name_is_what_it_says(name: str) -> None:
    assert getattr(fledge.checkpoint, name).__name__ == name
    assert not (Path(fledge.checkpoint.__file__).parent / f"{name}.py").exists()


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'guess'"):
        _ = fledge.checkpoint.guess


def test_the_door_itself_is_light() -> None:
    code = "import sys, fledge.checkpoint; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
