"""The cost of imports: `fledge`, the tokenizer and the command line start without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

TORCH = {"torch", "triton"}
HEAVY = TORCH | {"numpy", "safetensors", "typer", "rich"}


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that `statement` loads in a new interpreter."""
    # Modules that are loaded before the statement, such as those of site hooks, do not count.
    code = (
        f"import json, sys; before = set(sys.modules)\n{statement}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import fledge", HEAVY),
        ("import fledge.core.errors, fledge.core.config, fledge.core.files", HEAVY),
        ("import fledge.tokenizer", TORCH),
        ("import fledge.cli.main", TORCH),
        ("import fledge.cli.commands.serve", TORCH | {"fastapi", "pydantic", "uvicorn"}),
    ],
)
def test_import_is_light(statement: str, forbidden: set[str]) -> None:
    loaded = loaded_after(statement)
    assert "fledge" in loaded
    assert loaded & forbidden == set()


def test_probe_sees_a_heavy_import() -> None:
    assert "numpy" in loaded_after("import numpy")
