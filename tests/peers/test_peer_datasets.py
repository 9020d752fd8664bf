"""Hub sources with the real package `datasets`, which streams a folder here as it would a data set of the hub."""

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


def fledge(folder: Path, hub: str) -> subprocess.CompletedProcess[str]:
    """`fledge data build` in a process that may not use the network."""
    (folder / "c.toml").write_text(CONFIG.format(hub=hub))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "fledge", "data", "build", "c.toml", "--to", "store", "--workers", "1"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_folder_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in range(3):
        rows = [{"body": f"Document {number} of part {part} is here."} for number in range(5)]
        (tmp_path / "data" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fledge(tmp_path, str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["documents"]["train"] == 15 and manifest["inputs"][0]["sha256"] is None
    assert ["read", "en", "streamed", 15] in [row[:4] for row in manifest["counts"]["rows"]]


def test_offline_is_one_line(tmp_path: Path) -> None:
    done = fledge(tmp_path, "nobody/no-such-data-set")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "nobody/no-such-data-set cannot be read from the hub" in line
    assert "is this machine online" in line
