"""The choice of device and dtype, its reason, and the refused values."""

from __future__ import annotations

import pytest
import torch

from fledge.core.device import choose_device, choose_dtype
from fledge.core.errors import UsageError

CPU = torch.device("cpu")


def test_the_cpu_is_chosen_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == (CPU, "no CUDA GPU is present")


def test_a_gpu_is_chosen_if_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert choose_device() == (torch.device("cuda"), "a GPU is present: Some GPU")
    assert choose_device("cpu") == (CPU, "requested")


def test_a_numbered_gpu_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1")[0] == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="'cuda:2' is not available: torch sees 2"):
        choose_device("cuda:2")


def test_an_apple_gpu_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match="'mps' is not available"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps")[0].type == "mps"


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cpu:-1", "CPU"])
def test_unknown_devices_are_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UsageError, match="choose cpu, cuda"):
        choose_device(name)


def test_the_default_dtype_depends_on_size_and_device() -> None:
    assert choose_dtype(None, CPU, 49_999_999)[0] is torch.float32
    assert choose_dtype(None, CPU, 50_000_000) == (None, "as in the file")
    assert choose_dtype(None, torch.device("cuda"), 1)[0] is None


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("float16", torch.float16), ("fp32", torch.float32)])
def test_dtypes_by_name(name: str, dtype: torch.dtype) -> None:
    assert choose_dtype(name, CPU, 1) == (dtype, "requested")


def test_unknown_dtypes_are_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match="dtype 'int8' is unknown; choose float32, fp32, float16"):
        choose_dtype("int8", CPU, 1)
