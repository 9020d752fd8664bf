"""Facts about machine and installation: plain JSON, and the extras are those of the package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fledge.bench import environment
from fledge.bench.environment import EXTRAS, Extra, machine_facts, package_version

REPO = Path(__file__).resolve().parents[2]


def test_facts_are_plain_json() -> None:
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"] and 1 <= facts["usable_cores"] <= facts["cores"] and facts["torch"] and facts["cpu_features"]


def test_missing_facts_are_no_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "_text", lambda _path: "")
    monkeypatch.setattr(environment, "_output", lambda *_command: "")
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    facts = machine_facts()
    assert facts["cpu"] and facts["commit"] is None and environment.free_memory_bytes() is None


def test_extras_are_those_of_the_package() -> None:
    declared = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    section = declared.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert {extra.name for extra in EXTRAS} | {"dev"} == set(re.findall(r"^(\w+) = \[", section, re.M))


def test_an_extra_says_how_to_get_it() -> None:
    assert Extra("json", ("json",), "").command == ""
    absent = Extra("odd", ("json", "no_such_module_here"), "")
    assert absent.missing == ("no_such_module_here",) and absent.command == 'pip install "fledge[odd]"'


def test_versions() -> None:
    assert package_version("torch") and package_version("no-such-distribution-here") is None
