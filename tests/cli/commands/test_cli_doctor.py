"""`fledge doctor`: its report, and its exit code if a check fails."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fledge.diagnostics import diagnosis
from fledge.diagnostics.selfcheck import KernelCheck, check_kernels


@pytest.fixture
def doctor(fledge: Any, pruned_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `fledge doctor ARGUMENTS` with a bundled model and these results of the self-check."""
    passed = check_kernels()

    def run(*arguments: str, bundled: Path = pruned_model, checks: list[KernelCheck] | None = None) -> Any:
        monkeypatch.setattr(diagnosis, "get_asset_path", lambda _name: bundled)
        monkeypatch.setattr(diagnosis, "check_kernels", lambda: checks or passed)
        return fledge("doctor", *arguments)

    return run


def test_healthy_installation_passes_all_checks(doctor: Any) -> None:
    result = doctor()
    assert result.code == 0 and result.messages == "" and result.text.endswith("All checks passed.\n")
    for word in ("python", "torch", "cpu", "memory", "chunked", "reference", "sha256", "hub", "train"):
        assert word in result.text


def test_json(doctor: Any) -> None:
    record = json.loads(doctor("--json").text)
    assert record["healthy"] and record["bundled_model"]["problem"] is None
    assert len(record["bundled_model"]["sha256"]) == 64 and all(check["passed"] for check in record["checks"])
    backends = {check["backend"].split(",")[0] for check in record["checks"]}
    assert backends - {"packed", "native"} == {"reference", "chunked"}
    assert record["machine"]["torch"] and record["threads"] >= 1 and "hub" in record["extras"]


def test_a_wrong_kernel(doctor: Any) -> None:
    wrong = [
        dataclasses.replace(check_kernels()[0], error=float("nan")),
        KernelCheck("wkv", "other", "cpu", float("inf"), 0.0, "RuntimeError: no such instruction"),
    ]
    result = doctor(checks=wrong)
    assert result.code == 1 and "wrong" in result.text and "no such instruction" in result.text
    assert "A check failed" in result.text
    record = json.loads(doctor("--json", checks=wrong).text)
    assert not record["healthy"] and [check["error"] for check in record["checks"]] == [None, None]


def test_missing_or_damaged_bundled_model_is_reported(doctor: Any, tmp_path: Path) -> None:
    result = doctor(bundled=tmp_path / "tiny-finch.safetensors")
    assert result.code == 1 and "missing; install Fledge again" in result.text
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    result = doctor("--json", bundled=tmp_path / "damaged.safetensors")
    assert result.code == 1 and "damaged" in json.loads(result.text)["bundled_model"]["problem"]
