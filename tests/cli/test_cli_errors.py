"""Files that cannot be used, given to the commands that take files: one line, an exit code, no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoints import random_checkpoint


def _model(**changes: Any) -> dict[str, Any]:
    return random_checkpoint("6.0", **{"n_layer": 2, "n_embd": 16, "vocab_size": 256} | changes)


class Trap:
    """Touches the file `trap` when a pickle that holds it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def missing(folder: Path) -> Path:
    return folder / "gone.pth"


def truncated(folder: Path) -> Path:
    torch.save(_model(), folder / "model.pth")
    data = (folder / "model.pth").read_bytes()
    (folder / "model.pth").write_bytes(data[: len(data) // 2])
    return folder / "model.pth"


def corrupt(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not a header}  ")
    return folder / "model.safetensors"


def malicious(folder: Path) -> Path:
    torch.save({**_model(), "extra": Trap(folder / "trap")}, folder / "model.pth")
    return folder / "model.pth"


def without_a_tensor(folder: Path) -> Path:
    tensors = _model()
    del tensors["blocks.1.ffn.key.weight"]
    torch.save(tensors, folder / "model.pth")
    return folder / "model.pth"


def version_7(folder: Path) -> Path:
    tensors = _model()
    tensors["blocks.0.att.r_k"] = torch.zeros(2, 8)
    torch.save(tensors, folder / "model.pth")
    return folder / "model.pth"


def two_vocabulary_sizes(folder: Path) -> Path:
    tensors = _model()
    tensors["head.weight"] = tensors["head.weight"][:200].clone()
    torch.save(tensors, folder / "model.pth")
    return folder / "model.pth"


def text_file(folder: Path) -> Path:
    (folder / "model.pth").write_text("not a model\n")
    return folder / "model.pth"


def training_checkpoint(folder: Path) -> Path:
    facts = {"step": 3, "identity": {"seed": 1}, "meter": {"losses": [2.0]}}
    torch.save({**facts, "model": _model(), "optimizer": {"state": {}, "param_groups": []}}, folder / "last.pt")
    return folder / "last.pt"


BAD: dict[Callable[[Path], Path], tuple[str, ...]] = {
    missing: ("there is no",),
    truncated: ("model.pth", "truncated"),
    corrupt: ("model.safetensors",),
    malicious: ("was refused", "nothing was run"),
    without_a_tensor: ("missing: blocks.1.ffn.key.weight",),
    version_7: ("RWKV-7",),
    two_vocabulary_sizes: ("emb.weight has 256 rows", "head.weight has 200"),
    text_file: ("neither a .pth",),
    training_checkpoint: ("last.pt is the checkpoint from which `fledge train`", "not its result; give the model"),
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_files_that_are_no_models(fledge: Any, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    for arguments in (
        ["info", path],
        ["generate", "Once", "--model", path],
        ["chat", "--model", path],
        ["tokenize", "Once", "--model", path],
        ["convert", path, tmp_path / "copy.safetensors"],
        ["bench", "cpu", "--model", path],
    ):
        fledge(*arguments).check_error(1, *BAD[make])
    assert not (tmp_path / "trap").exists() and not (tmp_path / "copy.safetensors").exists()


def test_a_vocabulary_that_no_tokenizer_fits(fledge: Any, tmp_path: Path) -> None:
    torch.save(_model(vocab_size=300), tmp_path / "model.pth")
    for arguments in (["generate", "Once"], ["chat"], ["tokenize", "Once"]):
        fledge(*arguments, "--model", tmp_path / "model.pth").check_error(1, "300 token rows", "no stored vocabulary")
