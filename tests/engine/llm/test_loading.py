"""Loading: the checkpoint, its tokenizer, and the chosen device and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from random_checkpoints import random_checkpoint

import fledge
from fledge import checkpoint
from fledge.checkpoint import reader
from fledge.core.errors import CheckpointError, UnsupportedError, UsageError
from fledge.engine.llm import loading
from fledge.native.library import library
from fledge.tokenizer import load_world, prune, world_vocabulary


def save_pth(folder: Path, vocab_size: int, dtype: torch.dtype = torch.float32) -> Path:
    path = folder / "small.pth"
    torch.save(random_checkpoint("6.0", n_layer=1, n_embd=16, vocab_size=vocab_size, dtype=dtype), path)
    return path


def test_byte_model_generates(tmp_path: Path) -> None:
    llm = fledge.load(save_pth(tmp_path, 256, torch.bfloat16), device="cpu")
    assert (llm.name, llm.device.type, llm.dtype) == ("small", "cpu", torch.float32)
    assert llm.device_reason == "requested" and "float32" in llm.dtype_reason
    assert not llm.model.training
    assert len(llm.generate("abc", max_tokens=5, seed=1).ids) == 5


def test_checkpoint_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, read_raw = list[dict[str, Any]](), reader.read_raw

    def counting(path: Path, **options: Any) -> Any:
        calls.append(options)
        return read_raw(path, **options)

    monkeypatch.setattr(reader, "read_raw", counting)
    fledge.load(save_pth(tmp_path, 256), device="cpu")
    assert calls == [{"weights": True}]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_model_computes_the_same_logits(
    tmp_path: Path, dtype: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for memory-mapped weights: the packed copy must be complete before the pages of the file are released."""
    monkeypatch.setattr("fledge.models.layers.WORTH_PACKING", 0)
    if not native:
        monkeypatch.setattr("fledge.checkpoint.model_loader.why_not_native", lambda config: "not built")
    for stored in (torch.float32, torch.bfloat16, torch.float16):
        path = save_pth(tmp_path, 256, stored)
        packed, plain = (fledge.load(path, device="cpu", dtype=dtype, pack=pack) for pack in (True, False))
        assert "head.weight" in plain.model.state_dict()
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            # In bfloat16, a different order of summation can round to the next number.
            tolerance = MODEL_TOLERANCE if dtype == "float32" else 2e-2
            assert_close_relative(packed.model(ids)[0], plain.model(ids)[0], tolerance, "logits")
            assert packed.dtype == plain.dtype


def test_requested_dtype(tmp_path: Path) -> None:
    llm = fledge.load(str(save_pth(tmp_path, 256)), device="cpu", dtype="bf16")
    assert (llm.dtype, llm.dtype_reason) == (torch.bfloat16, "requested")


def test_weights_property_names_the_matrix_formats(tmp_path: Path) -> None:
    path = save_pth(tmp_path, 256, torch.bfloat16)
    assert fledge.load(path, device="cpu", dtype="bfloat16").weights == "bfloat16"
    native = library() is not None
    for quant, held in (("int8", "int8"), ("int4", "int4")):
        assert fledge.load(path, device="cpu", quant=quant).weights == (held if native else "float32")


@pytest.mark.parametrize(
    ("large", "kept", "words"),
    [
        (torch.bfloat16, torch.bfloat16, "as in the file"),
        (torch.float16, torch.float32, "the file's float16"),
    ],
)
def test_large_model_keeps_its_dtype_if_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: torch.dtype, kept: torch.dtype, words: str
) -> None:
    monkeypatch.setattr("fledge.core.device.SMALL_MODEL", 0)
    llm = fledge.load(save_pth(tmp_path, 256, large), device="cpu")
    assert llm.dtype == kept and words in llm.dtype_reason


def test_tokenizer_is_chosen_by_the_stored_vocabulary_or_its_size() -> None:
    pruned = prune(world_vocabulary(), range(300, 400))
    assert checkpoint.load_tokenizer(pruned.to_spec(), pruned.size, "a file").vocab_size == 357
    assert checkpoint.load_tokenizer(None, 65536, "a file") is load_world()
    assert checkpoint.load_tokenizer(None, 256, "a file").encode("a") == [97]
    with pytest.raises(UnsupportedError, match="GPT-NeoX"):
        checkpoint.load_tokenizer(None, 50277, "a file")
    with pytest.raises(UnsupportedError, match="a file has 300 token rows"):
        checkpoint.load_tokenizer(None, 300, "a file")


def test_errors_of_missing_files_name_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"there is no .*gone\.pth"):
        fledge.load(tmp_path / "gone.pth")
    monkeypatch.setattr(loading, "get_asset_path", lambda name: tmp_path / name)
    for name in (None, "tiny-finch"):
        with pytest.raises(CheckpointError, match=r"tiny-finch.safetensors is missing .*; install"):
            fledge.load(name)
    with pytest.raises(UsageError, match="device 'tpu'"):
        fledge.load(save_pth(tmp_path, 256), device="tpu")


def test_default_is_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = prune(world_vocabulary(), range(300, 400))
    config, tensors = checkpoint.load(save_pth(tmp_path, vocabulary.size))
    checkpoint.save(tmp_path / "tiny-finch.safetensors", config, tensors, tokenizer_spec=vocabulary.to_spec())
    monkeypatch.setattr(loading, "get_asset_path", lambda name: tmp_path / name)
    llm = fledge.load(device="cpu")
    assert (llm.name, llm.tokenizer.vocab_size) == ("tiny-finch", vocabulary.size)
    assert llm.generate("Hello", max_tokens=3, ban=(0,)).prompt_tokens >= 1


def test_bundled_model_generates_text() -> None:
    if not loading.get_asset_path("tiny-finch.safetensors").is_file():
        pytest.skip("the bundled model tiny-finch.safetensors is not in this checkout")
    done = fledge.load(device="cpu").generate("Once upon a time", max_tokens=12, seed=1)
    assert done.text.strip()


def test_trained_checkpoint(shared: Path) -> None:
    llm = fledge.load(shared / "models" / "tiny-eagle" / "model.pth", device="cpu")
    done = llm.generate("The ", temperature=0.0, max_tokens=20)
    assert llm.config.version == "5.2" and len(done.text) == 20 and done.text.isascii()
