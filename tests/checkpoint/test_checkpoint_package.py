"""The public names of the package load on first use, and no module hides them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fledge.checkpoint

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", fledge.checkpoint.__all__)
def test_every_public_name_is_correct(name: str) -> None:
    assert getattr(fledge.checkpoint, name).__name__ == name
    assert not (Path(fledge.checkpoint.__file__).parent / f"{name}.py").exists()


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'guess'"):
        _ = fledge.checkpoint.guess


def test_the_import_is_light() -> None:
    code = "import sys, fledge.checkpoint; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
