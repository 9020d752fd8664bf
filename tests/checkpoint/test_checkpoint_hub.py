"""Names resolve to local paths first, then to hub repositories; errors give hints. No network is used."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_checkpoints import make_tensors, save_pth

from fledge.checkpoint import hub, load
from fledge.core.errors import CheckpointError


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A fake huggingface_hub that records its calls and has no repositories."""
    calls: list[tuple[Any, ...]] = []

    def fail(*arguments: Any, **options: Any) -> str:
        calls.append((*arguments, *options.values()))
        raise OSError("Repository Not Found\nfor url ...")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fail, hf_hub_download=fail))
    monkeypatch.setattr(hub, "find_spec", lambda name: object())
    return calls


def test_a_local_path_has_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_hub: list[Any]) -> None:
    (tmp_path / "owner").mkdir()
    save_pth(tmp_path / "owner", make_tensors("4"), "name")
    monkeypatch.chdir(tmp_path)
    assert load("owner/name")[0].version == "4" and not fake_hub


def test_a_repository_is_downloaded_as_a_folder(monkeypatch: pytest.MonkeyPatch, fake_hub: list[Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"RWKV/v6-Finch is not a local path and could not be downloaded"
    ) as caught:
        load("RWKV/v6-Finch")
    assert fake_hub[0][0] == "RWKV/v6-Finch" and "config.json" in fake_hub[0][1]
    assert "Repository Not Found" in str(caught.value) and "\n" not in str(caught.value)


def test_one_file_of_a_repository_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_pth(tmp_path, make_tensors("6.0"))
    requests: list[Any] = []

    def download(*names: str) -> str:
        requests.append(names)
        return str(path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    monkeypatch.setattr(hub, "find_spec", lambda name: object())
    assert load("BlinkDL/rwkv-6-world/RWKV-x060.pth")[0].version == "6.0"
    assert requests == [("BlinkDL/rwkv-6-world", "RWKV-x060.pth")]


def test_without_the_library_the_error_explains_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r'huggingface_hub is not installed.*pip install "fledge\[hub\]"'):
        load("RWKV/v6-Finch")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("modle.pth", r"did you mean model\.pth"),
        ("zzz.pth", r"that folder holds model\.pth"),
        ("models/tiny.pth", "exists, but the rest of the path does not"),
        ("owner/name.safetensors", "exists, but the rest of the path does not"),
        ("./owner/name", "exists, but the rest of the path does not"),
        ("../a/b/c/d", "exists, but the rest of the path does not"),
        ("sub/name", r"there is no sub/name"),
        ("~nosuchuser/x", r"'~nosuchuser/x' cannot be looked up \(.*home directory"),
        ("x" * 300, r"cannot be looked up \(File name too long\)"),
        ("sub/" + "x" * 300 + ".pth", r"cannot be looked up \(File name too long\)"),
    ],
)
def test_a_name_like_a_path_is_never_downloaded(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_hub: list[Any]
) -> None:
    (tmp_path / "sub").mkdir()
    save_pth(tmp_path, make_tensors("4"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"there is no .*{hint}|{hint}"):
        load(name)
    with pytest.raises(CheckpointError):
        load(Path("RWKV/v6-Finch"))  # a Path is a path
    assert not fake_hub
