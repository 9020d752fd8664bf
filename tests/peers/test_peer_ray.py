"""A build on Ray Data with a local cluster gives the same store and the same errors as a build without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("rensa")
pytestmark = pytest.mark.peer

CONFIG = """
piece_bytes = 3000
[[sources]]
path = "corpus.jsonl"
[languages]
identify = false
[validation]
share = 0.2
"""


def run_fledge(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a separate process, because Ray leaves threads running and emits warnings."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "fledge", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_ray_gives_the_same_store(tmp_path: Path) -> None:
    rows = [{"text": f"Text {number}: " + f"word{number} " * (number % 7 + 20), "lang": "en"} for number in range(60)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.toml").write_text(CONFIG)
    for arguments in (("--to", "plain", "--workers", "1"), ("--to", "ray", "--ray")):
        result = run_fledge(tmp_path, "data", "build", "c.toml", *arguments)
        assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ray").iterdir())
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes() for name in names)
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write("{\n")
    result = run_fledge(tmp_path, "data", "build", "c.toml", "--to", "bad", "--ray")
    assert result.returncode == 2 and "corpus.jsonl, line 61" in result.stderr
