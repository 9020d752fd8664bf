"""Facts about the machine and this process: plain JSON, and no errors for missing facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.core import machine
from fledge.core.machine import machine_facts, package_version, peak_memory, resident_memory


def test_facts_are_plain_json() -> None:
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"] and 1 <= facts["usable_cores"] <= facts["cores"] and facts["torch"] and facts["cpu_features"]


def test_missing_facts_are_no_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_read_text", lambda _path: "")
    monkeypatch.setattr(machine, "_command_output", lambda *_command: "")
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    facts = machine_facts()
    assert facts["cpu"] and facts["commit"] is None and machine.free_memory_bytes() is None
    assert resident_memory() is None


def test_memory_is_that_of_this_process() -> None:
    peak, resident = peak_memory(), resident_memory()
    assert peak is None or 1 << 20 < peak < 1 << 40
    assert resident is None or peak is None or 1 << 20 < resident <= peak


def test_versions() -> None:
    assert package_version("torch") and package_version("no-such-distribution-here") is None
