"""Written GGUF files: types, keys, exact quantized matrices, and atomic writes."""

from __future__ import annotations

import gc
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoints import are_equal, make_tensors, save_pth
from torch import Tensor

gguf = pytest.importorskip("gguf")

import foreign_gguf as foreign  # noqa: E402 - it needs the package

from fledge.checkpoint import convert, load, read, save, writer  # noqa: E402
from fledge.checkpoint.formats.gguf.writer import TYPES  # noqa: E402
from fledge.core.errors import CheckpointError, UnsupportedError, UsageError  # noqa: E402
from fledge.kernels.quantized import QuantizedMatrix, assemble  # noqa: E402
from fledge.tokenizer import prune, world_vocabulary  # noqa: E402

SIZES: dict[str, Any] = {"n_layer": 3, "n_embd": 64, "head_size": 16}
MATRICES = ("receptance.weight", "key.weight", "value.weight", "gate.weight", "output.weight")


def make_finch(**sizes: Any) -> dict[str, Tensor]:
    return make_tensors("6.0", **(SIZES | sizes))


def write_gguf(folder: Path, tensors: dict[str, Tensor], kind: str | None = None) -> Path:
    convert(save_pth(folder, tensors), folder / "m.gguf", matrix_type=kind, force=True)
    return folder / "m.gguf"


def select_float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are F32 in every file."""
    return {
        n: t.float() for n, t in tensors.items() if not n.endswith(MATRICES) and n not in ("emb.weight", "head.weight")
    }


@pytest.mark.parametrize("kind", TYPES)
def test_the_file_agrees_with_an_independent_converter(kind: str, tmp_path: Path) -> None:
    """Compare names, shapes, types and bytes with an independent writer."""
    tensors = make_finch()
    matrix_type = gguf.GGMLQuantizationType[kind.upper()]
    embedding_type = gguf.GGMLQuantizationType.F16 if matrix_type > 1 and kind != "bf16" else matrix_type
    expected = gguf.GGUFReader(
        foreign.write(
            tmp_path / "theirs.gguf",
            foreign.convert_tensors(tensors, 0),
            foreign.make_keys(tensors, 0),
            kind=matrix_type,
            kinds={"token_embd.weight": embedding_type},
        )
    )
    loaded = gguf.GGUFReader(write_gguf(tmp_path, tensors, kind))
    by_name = {tensor.name: tensor for tensor in loaded.tensors}
    assert by_name.keys() == {tensor.name for tensor in expected.tensors}
    for reference in expected.tensors:
        actual = by_name[reference.name]
        assert actual.tensor_type == reference.tensor_type and actual.shape.tolist() == reference.shape.tolist(), (
            reference.name
        )
        assert np.array_equal(actual.data, reference.data), reference.name
    is_quantized = kind not in ("f32", "f16", "bf16")
    assert ("general.quantization_version" in loaded.fields) == is_quantized
    assert (
        loaded.fields["general.file_type"].contents()
        == gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]
    )
    same_keys = foreign.make_keys(tensors, 0) | {"rwkv6.time_mix_extra_dim": 8, "rwkv6.time_decay_extra_dim": 12}
    for key, value in same_keys.items():
        if key not in ("general.file_type", "general.quantization_version"):
            assert loaded.fields[key].contents() == pytest.approx(value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_of_the_source_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = make_finch(dtype=dtype)
    config, loaded = load(write_gguf(tmp_path, tensors))
    assert config == load(tmp_path / "model.pth")[0]
    assert are_equal(loaded, tensors | select_float32(tensors))


def quantize_randomly(tensors: dict[str, Tensor], format: str) -> dict[str, QuantizedMatrix]:
    """Random quantized matrices with the names and shapes of those of a model."""
    generator = torch.Generator().manual_seed(1)
    low, high = (-127, 128) if format == "int8" else (0, 16)
    quantized = {}
    for name, tensor in tensors.items():
        if name.endswith(MATRICES) or name == "head.weight":
            rows, columns = tensor.shape
            q = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
            scale, minimum = torch.randn(2, rows, columns // 32, generator=generator)
            quantized[name] = assemble(format, q, scale, minimum if format == "int4" else None)
    return quantized


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_matrices_stay_bit_for_bit(format: str, tmp_path: Path) -> None:
    tensors = make_finch(dtype=torch.bfloat16)
    config = load(save_pth(tmp_path, tensors))[0]
    quantized = quantize_randomly(tensors, format)
    dense = {name: tensor for name, tensor in tensors.items() if name not in quantized}
    save(tmp_path / "a.safetensors", config, dense, quantized=quantized)
    assert [note[:13] for note in convert(tmp_path / "a.safetensors", tmp_path / "b.gguf").notes] == ["no vocabulary"]
    convert(tmp_path / "b.gguf", tmp_path / "c.safetensors")
    convert(tmp_path / "c.safetensors", tmp_path / "d.gguf")
    for name in ("b.gguf", "c.safetensors", "d.gguf"):
        loaded = read(tmp_path / name)
        assert {n: m.format for n, m in loaded.quantized.items()} == dict.fromkeys(quantized, format)
        assert all(torch.equal(m.data, quantized[n].data) for n, m in loaded.quantized.items())
        assert loaded.tensors["emb.weight"].dtype == torch.bfloat16
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert kinds == {"F32", "BF16", "Q8_0" if format == "int8" else "Q4_1"}


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_a_second_conversion_changes_nothing(kind: str, tmp_path: Path) -> None:
    first = write_gguf(tmp_path, make_finch(), kind)
    convert(first, tmp_path / "again.gguf")
    assert are_equal(load(first)[1], load(tmp_path / "again.gguf")[1])


def test_requantization_is_reported_and_unpacking_is_exact(tmp_path: Path) -> None:
    first = write_gguf(tmp_path, make_finch(), "q8_0")
    assert not any("a second time" in note for note in convert(first, tmp_path / "q.gguf").notes)
    notes = convert(first, tmp_path / "q.gguf", matrix_type="q4_0", force=True).notes
    assert any("25 matrices were quantized a second time" in note for note in notes), notes
    convert(first, tmp_path / "f.gguf", matrix_type="f32")
    exact = load(first)[1]
    assert are_equal(load(tmp_path / "f.gguf")[1], {name: tensor.float() for name, tensor in exact.items()})


@pytest.mark.parametrize(("name", "to"), [("x.pth", None), ("hf", None), ("fla", "fla")])
def test_formats_without_quantized_matrices_get_bfloat16(name: str, to: str | None, tmp_path: Path) -> None:
    first = write_gguf(tmp_path, make_finch(), "q4_1")
    notes = convert(first, tmp_path / name, to=to).notes
    assert "the quantized matrices were written as bfloat16" in notes
    expected = {n: t.bfloat16() if n in read(first).quantized else t for n, t in load(first)[1].items()}
    assert are_equal(load(tmp_path / name)[1], expected)


def test_short_rows_become_float16(tmp_path: Path) -> None:
    tensors = make_finch(n_embd=48, dim_ffn=64)
    result = convert(save_pth(tmp_path, tensors), tmp_path / "m.gguf", matrix_type="q8_0")
    assert any("22 matrices became F16" in note and "multiple of 32" in note for note in result.notes), result.notes
    loaded = read(tmp_path / "m.gguf")
    assert loaded.quantized.keys() == {f"blocks.{layer}.ffn.value.weight" for layer in range(3)}
    assert torch.equal(loaded.tensors["head.weight"], tensors["head.weight"].half())


def test_numbers_beyond_float16_are_rejected_except_for_bfloat16(tmp_path: Path) -> None:
    tensors = make_finch()
    tensors["blocks.1.att.key.weight"][2, 3] = 70000.0
    for kind in ("f16", "q8_0", "q5_1"):
        with pytest.raises(CheckpointError, match=r"blocks\.1\.att\.key\.weight is too large for .*; use f32 or bf16"):
            write_gguf(tmp_path, tensors, kind)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]
    assert float(load(write_gguf(tmp_path, tensors, "bf16"))[1]["blocks.1.att.key.weight"][2, 3]) == pytest.approx(
        70000, rel=0.01
    )


def test_vocabularies_are_written_and_losses_are_reported(tmp_path: Path) -> None:
    vocabulary = prune(world_vocabulary(), [261, *range(300, 400)], size=384)
    tensors = make_finch(vocab_size=384)
    config = replace(load(save_pth(tmp_path, tensors))[0], group_norm_eps=1e-5, norm_eps=2e-5)
    save(tmp_path / "a.safetensors", config, tensors, tokenizer_spec=vocabulary.to_spec(), extra={"steps": 3})
    notes = convert(tmp_path / "a.safetensors", tmp_path / "m.gguf").notes
    assert [note.split()[0:2] for note in notes] == [["llama.cpp", "always"], ["a", ".gguf"]]
    loaded = read(tmp_path / "m.gguf")
    assert loaded.tokenizer_spec == vocabulary.to_spec() and loaded.config.norm_eps == 2e-5
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == vocabulary.tokens.index(b"\n\n") == 257
    assert fields["tokenizer.ggml.tokens"].contents(slice(256, 259)) == [r"\xff", r"\n\n", " A"]
    assert (
        fields["tokenizer.ggml.tokens"].contents(-1) == "[PAD383]"
        and fields["tokenizer.ggml.bos_token_id"].contents() == 0
    )

    notes = convert(save_pth(tmp_path, make_finch()), tmp_path / "n.gguf").notes
    assert notes == ("no vocabulary is known for this model; llama.cpp will take token ids only",)
    assert gguf.GGUFReader(tmp_path / "n.gguf").fields["tokenizer.ggml.model"].contents() == "none"
    assert read(tmp_path / "n.gguf").tokenizer_spec is None


def test_the_name_is_kept(tmp_path: Path) -> None:
    keys = foreign.make_keys(make_finch(), 0) | {"general.name": "Small Finch"}
    source = foreign.write(tmp_path / "theirs.gguf", foreign.convert_tensors(make_finch(), 0), keys)
    assert "extras" not in "".join(convert(source, tmp_path / "ours.gguf").notes)
    assert read(tmp_path / "ours.gguf").extra["name"] == "Small Finch"
    assert read(write_gguf(tmp_path, make_finch())).extra["name"] == "m"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("4", "version 4, and GGUF supports only RWKV-6"),
        ("5.2", "version 5.2, and GGUF"),
        ("6.0 tuned", "tuned state"),
    ],
)
def test_models_that_gguf_does_not_support_are_rejected(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"model\.pth (is|has).*{message}.*use \.safetensors"):
        convert(save_pth(tmp_path, make_tensors(kind)), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_invalid_requests_are_rejected(tmp_path: Path) -> None:
    source = save_pth(tmp_path, make_finch())
    with pytest.raises(UsageError, match="type 'q3_k' is unknown; use one of f32, f16, bf16, q8_0"):
        convert(source, tmp_path / "m.gguf", matrix_type="q3_k")
    with pytest.raises(UsageError, match=r"type 'q8_0' is only for a \.gguf"):
        convert(source, tmp_path / "m.safetensors", matrix_type="q8_0")
    with pytest.raises(UsageError, match=r"must be named \*\.gguf"):
        convert(source, tmp_path / "m.bin", to="gguf")


def test_a_file_can_be_converted_in_place(tmp_path: Path) -> None:
    path = write_gguf(tmp_path, make_finch(), "q8_0")
    before = {name: tensor.clone() for name, tensor in load(path)[1].items()}
    convert(path, path, force=True)
    assert are_equal(before, load(path)[1])


def test_a_failed_conversion_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path, make_finch())
    before = path.read_bytes()

    def fail(*args: object, **rest: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(OSError, match="disk on fire"):
        convert(tmp_path / "model.pth", path, force=True)
    gc.collect()  # an unclosed file would warn
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.gguf", "model.pth"]


def test_a_full_disk_is_detected_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 1000, 1000))
    source = save_pth(tmp_path, make_finch())
    with pytest.raises(CheckpointError, match="GB free"):
        convert(source, tmp_path / "m.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]
