"""Hub sources with the real package `datasets`, which streams a local folder like a data set of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytestmark = pytest.mark.peer

CONFIG = """
[[sources]]
hub = "{hub}"
text = "body"
name = "streamed"
language = "en"
[dedup]
near = false
[validation]
share = 0.0
"""


def run_build(folder: Path, hub: str) -> subprocess.CompletedProcess[str]:
    """Run `fledge data build` in a process without network access."""
    (folder / "c.toml").write_text(CONFIG.format(hub=hub))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "fledge", "data", "build", "c.toml", "--to", "store", "--workers", "1"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_streams_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in range(3):
        rows = [{"body": f"Document {number} of part {part} is here."} for number in range(5)]
        (tmp_path / "data" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_build(tmp_path, str(tmp_path / "data"))
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["documents"]["train"] == 15 and manifest["inputs"][0]["sha256"] is None
    assert ["read", "en", "streamed", 15] in [row[:4] for row in manifest["counts"]["rows"]]


def test_an_offline_error_is_one_line(tmp_path: Path) -> None:
    result = run_build(tmp_path, "nobody/no-such-data-set")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "nobody/no-such-data-set cannot be read from the hub" in line
    assert "check that this machine is online" in line
