"""The self-check passes on this machine, and detects broken kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fledge.diagnostics import selfcheck
from fledge.diagnostics.selfcheck import TOLERANCE, check_kernels
from fledge.kernels import WKV4_BACKENDS, WKV_BACKENDS, native_ops, why_not_packable
from fledge.kernels.wkv.reference import wkv_reference
from fledge.native.library import why_missing


def test_every_backend_passes_with_a_margin() -> None:
    checks = check_kernels()
    names = {(check.kernel, check.backend) for check in checks if check.device == "cpu"}
    packed = set() if why_not_packable(torch.float32) else {("linear", "packed")}
    plain = {("wkv", name) for name in WKV_BACKENDS} | {("wkv4", name) for name in WKV4_BACKENDS} | packed
    assert {name for name in names if not name[1].startswith("native")} == plain
    forward_only = {kernel for kernel, backend in names if backend.startswith("native")}
    wanted = {"wkv", "wkv4", *(f"product, {format}" for format in native_ops.FORMATS)}
    assert forward_only == (set() if why_missing() else wanted)
    for check in checks:
        margin = 4 if "int" in check.kernel else 20  # quantized products round their inputs to 16 bits
        assert check.passed and max(check.error, check.gradient_error) < TOLERANCE / margin, check


def clamped(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return wkv_reference(r, k, v, w.clamp(min=-5), u, state)


def without_state_gradient(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    *others, state = inputs
    return wkv_reference(*others, state.detach() + 0 * state)  # type: ignore[call-arg]


def not_a_number(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    y, state = wkv_reference(*inputs)  # type: ignore[call-arg]
    return y * torch.nan, state


def fails(*_inputs: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize("broken", [clamped, without_state_gradient, not_a_number, fails])
def test_a_broken_backend_is_detected(monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Any]) -> None:
    monkeypatch.setitem(WKV_BACKENDS, "chunked", broken)
    by_name = {(check.kernel, check.backend): check for check in selfcheck.check_kernels() if check.device == "cpu"}
    broken_check = by_name.pop(("wkv", "chunked"))
    assert not broken_check.passed and all(check.passed for check in by_name.values())
    if broken is fails:
        assert broken_check.problem == "RuntimeError: no such instruction" and math.isinf(broken_check.error)
