"""The optional parts of an installation are the extras of the package."""

from __future__ import annotations

import re
from pathlib import Path

from fledge.diagnostics.environment import EXTRAS, Extra

REPO = Path(__file__).resolve().parents[2]


def test_extras_are_those_of_the_package() -> None:
    declared = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    section = declared.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert {extra.name for extra in EXTRAS} | {"dev", "docs"} == set(re.findall(r"^(\w+) = \[", section, re.M))


def test_an_extra_has_the_command_that_installs_it() -> None:
    assert Extra("json", ("json",), "").command == ""
    absent = Extra("odd", ("json", "no_such_module_here"), "")
    assert absent.missing == ("no_such_module_here",) and absent.command == 'pip install "fledge[odd]"'
