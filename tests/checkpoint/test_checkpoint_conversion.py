"""Conversion between all formats without changed bits, atomic writes, and protection of existing targets."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from small_checkpoints import KINDS, are_equal, make_tensors, save_pth

from fledge.checkpoint import conversion, convert, load, load_model, read, save, writer
from fledge.core.errors import CheckpointError, UnsupportedError, UsageError

CONVERSIONS = [("a.safetensors", None), ("hf", None), ("fla", "fla"), ("b.safetensors", None), ("b.pth", None)]
SUPPORTED_VERSIONS = {"hf": ("4", "5.2", "6.0"), "fla": ("6.0",)}


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_through_every_format(kind: str, tmp_path: Path) -> None:
    tensors = make_tensors(kind)
    path = save_pth(tmp_path, tensors)
    steps = []
    for name, to in CONVERSIONS:
        versions = SUPPORTED_VERSIONS.get(name, (KINDS[kind]["version"],))
        if KINDS[kind]["version"] not in versions or (name == "fla" and "tuned" in kind):
            with pytest.raises(UnsupportedError, match="folder"):
                convert(path, tmp_path / name, to=to)
            assert not (tmp_path / name).exists()
            continue
        result = convert(path, tmp_path / name, to=to)
        assert result.target == tmp_path / name and result.source == path
        path = tmp_path / name
        steps.append(read(path).format)
        assert are_equal(tensors, load(path)[1])
    assert path == tmp_path / "b.pth" and steps[-1] == "pth"
    assert len(steps) == 3 + (KINDS[kind]["version"] in SUPPORTED_VERSIONS["hf"]) + (kind in ("6.0", "6.0 in bfloat16"))
    assert list(torch.load(path, weights_only=True)) == list(tensors)  # the official order of keys survives


def test_config_tokenizer_and_extras_are_kept_if_possible(tmp_path: Path) -> None:
    tensors = make_tensors("5.2", vocab_size=256)
    config = replace(load(save_pth(tmp_path, tensors))[0], group_norm_eps=1e-5)
    save(tmp_path / "a.safetensors", config, tensors, tokenizer_spec={"kind": "bytes"}, extra={"steps": 3})
    convert(tmp_path / "a.safetensors", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "b.safetensors")
    original, converted = read(tmp_path / "a.safetensors"), read(tmp_path / "b.safetensors")
    assert (original.config, original.tokenizer_spec, original.extra) == (
        converted.config,
        converted.tokenizer_spec,
        converted.extra,
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    notes = convert(tmp_path / "hf", tmp_path / "b.pth").notes
    assert len(notes) == 3 and "the tokenizer" in notes[0] and "group_norm_eps 1e-05" in notes[2]


def test_only_safetensors_supports_scaled_keys(tmp_path: Path) -> None:
    config, tensors = load(save_pth(tmp_path, make_tensors("6.0")))
    source = tmp_path / "scaled.safetensors"
    save(source, replace(config, scaled_keys=True), tensors)
    convert(source, tmp_path / "again.safetensors")
    assert read(tmp_path / "again.safetensors").config.scaled_keys
    assert not read(tmp_path / "model.pth").config.scaled_keys
    for name, to in (("b.pth", None), ("hf", None), ("fla", "fla"), ("c.gguf", None)):
        with pytest.raises(UnsupportedError, match="scaled keys, which only"):
            convert(source, tmp_path / name, to=to)
        assert not (tmp_path / name).exists()


def test_a_hf_folder_has_the_config_of_the_remote_code(tmp_path: Path) -> None:
    result = convert(save_pth(tmp_path, make_tensors("6.0", n_embd=64, head_size=16)), tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["architectures"] == ["Rwkv6ForCausalLM"] and settings["model_type"] == "rwkv6"
    assert settings["auto_map"]["AutoModelForCausalLM"] == "modeling_rwkv6.Rwkv6ForCausalLM"
    assert (settings["hidden_size"], settings["num_hidden_layers"], settings["head_size"]) == (64, 3, 16)
    assert (settings["head_size_divisor"], settings["vocab_size"], settings["bos_token_id"]) == (8, 37, 0)
    assert settings["tie_word_embeddings"] is False
    assert any("modeling_rwkv6.py" in note for note in result.notes) and any(
        "LoRA ranks" in note for note in result.notes
    )
    assert "num_heads" not in settings  # that name would make it a fla folder
    assert sorted(entry.name for entry in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]


def test_a_fla_folder_has_the_config_of_fla(tmp_path: Path) -> None:
    result = convert(save_pth(tmp_path, make_tensors("6.0")), tmp_path / "m", to="fla")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (settings["num_heads"], settings["expand_k"], settings["expand_v"]) == (3, 1.0, 1.0)
    assert (settings["proj_low_rank_dim"], settings["gate_low_rank_dim"]) == (8, 12)
    assert settings["norm_eps"] == 1e-5 and any("64e-5" in note for note in result.notes)


def test_an_existing_target_is_kept_without_force(tmp_path: Path) -> None:
    source = save_pth(tmp_path, make_tensors("6.0"))
    other = save_pth(tmp_path, make_tensors("4"), "other.pth")
    for name in ("t.pth", "t.safetensors", "folder"):
        convert(other, tmp_path / name)
        before = read(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"exists; to replace it give --force"):
            convert(source, tmp_path / name)
        assert are_equal(before.tensors, load(tmp_path / name)[1])
        convert(source, tmp_path / name, force=True)
        assert load(tmp_path / name)[0].version == "6.0"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "folder", "model.pth", "other.pth", "t.pth", "t.safetensors",
    ]  # fmt: skip


def test_a_folder_name_may_contain_a_dot(tmp_path: Path) -> None:
    source = save_pth(tmp_path, make_tensors("6.0"))
    for name, to in (("finch-1.6b", None), ("v1.5", None), ("odd.bin", "hf")):
        assert convert(source, tmp_path / name, to=to).format == "hf"


def test_a_misspelled_suffix_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean .*m\.safetensors\?"):
        convert(save_pth(tmp_path, make_tensors("6.0")), tmp_path / "m.safetensor")


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    convert(save_pth(tmp_path, make_tensors("4")), tmp_path / "new")
    assert load(tmp_path / "new")[0].version == "4"


def test_force_never_replaces_a_folder_with_other_files(tmp_path: Path) -> None:
    source = save_pth(tmp_path, make_tensors("6.0"))
    convert(source, tmp_path / "m")
    (tmp_path / "m" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds more than a model \(thesis\.txt\) and will not be replaced"):
        convert(source, tmp_path / "m", force=True)
    assert (tmp_path / "m" / "thesis.txt").read_text() == "years of work"


def test_files_and_folders_never_replace_each_other(tmp_path: Path) -> None:
    source = save_pth(tmp_path, make_tensors("4"))
    (tmp_path / "d.pth").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, but a pth checkpoint is not"):
        convert(source, tmp_path / "d.pth", force=True)
    (tmp_path / "plain").write_text("x")
    with pytest.raises(CheckpointError, match="is a file, but a hf checkpoint is not"):
        convert(source, tmp_path / "plain", force=True)


def test_a_file_can_be_converted_in_place(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    path = save_pth(tmp_path, tensors)
    convert(path, path, force=True)
    assert are_equal(tensors, load(path)[1])


def test_invalid_requests_are_rejected(tmp_path: Path) -> None:
    source = save_pth(tmp_path, make_tensors("4"))
    with pytest.raises(UsageError, match="format 'onnx' is unknown; use one of pth, safetensors, gguf, hf, fla"):
        convert(source, tmp_path / "x", to="onnx")
    with pytest.raises(UsageError, match=r"must be named \*\.safetensors"):
        convert(source, tmp_path / "x.pth", to="safetensors")
    for name in ("out.GGUF", "out.bin", "model.pt", "out.PTH", "out.SafeTensors", "out.tar.gz"):
        with pytest.raises(
            UsageError, match=rf"{name}: the suffix .* name a \*\.pth, \*\.safetensors or \*\.gguf file, or a folder"
        ):
            convert(source, tmp_path / name)
        assert not (tmp_path / name).exists()
    with pytest.raises(CheckpointError, match="there is no"):
        convert(tmp_path / "absent.pth", tmp_path / "x.pth")


def test_a_damaged_source_is_not_converted(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    complete = bytearray(save_pth(tmp_path, tensors).read_bytes())
    complete[complete.index(tensors["head.weight"].numpy().tobytes()) + 99] ^= 1
    (tmp_path / "bad.pth").write_bytes(complete)
    with pytest.raises(CheckpointError, match=r"bad\.pth is damaged"):
        convert(tmp_path / "bad.pth", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_full_disk_is_detected_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 1000, 1000))
    source = save_pth(tmp_path, make_tensors("4"))
    for name in ("x.pth", "x.safetensors", "deep/er/x"):
        with pytest.raises(CheckpointError, match=r"has 0\.00 GB free, and 0\.00 GB are needed; free space"):
            convert(source, tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x"])
def test_a_failed_conversion_leaves_no_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_pth(tmp_path, make_tensors("6.0"))
    convert(source, tmp_path / name)
    before = read(tmp_path / name).tensors

    def fail(*args: object, **rest: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(writer, "write_pth" if name == "x.pth" else "write_safetensors", fail)
    monkeypatch.setattr(conversion.json, "dumps", fail)
    with pytest.raises(OSError, match="disk on fire"):
        convert(source, tmp_path / name, force=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.pth", name]
    monkeypatch.undo()
    assert are_equal(before, load(tmp_path / name)[1])


def test_a_pth_contains_each_tensor_once(tmp_path: Path) -> None:
    """torch.save writes whole storages, and a mapped file is one large storage."""
    source = save_pth(tmp_path, make_tensors("6.0"))
    convert(source, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size == pytest.approx(source.stat().st_size, rel=0.05)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "layers"), [("4", 1), ("4", 2), ("5.0", 2), ("5.1", 2), ("5.2", 2), ("6.0", 1), ("6.0", 2)]
)
def test_the_rwkv_package_reads_converted_files(
    kind: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package detects versions by the order of keys, which safetensors files need not keep.

    It does not run RWKV-5 with one layer.
    """
    for name, value in {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0"}.items():
        monkeypatch.setenv(name, value)
    rwkv = pytest.importorskip("rwkv.model")
    tensors = make_tensors(kind, n_layer=layers)
    source = tmp_path / "x.safetensors"
    save(source, load(save_pth(tmp_path, tensors))[0], dict(sorted(tensors.items())))
    convert(source, tmp_path / "x.pth")
    expected, _ = rwkv.RWKV(model=str(tmp_path / "x"), strategy="cpu fp32").forward([3, 1, 4], None)
    with torch.no_grad():
        logits, _ = load_model(tmp_path / "x.pth").model(torch.tensor([[3, 1, 4]]))
    assert_close_relative(logits[0, -1], expected, MODEL_TOLERANCE, "logits")


def test_matrices_are_converted_to_another_type(tmp_path: Path) -> None:
    tensors = make_tensors("6.0")
    path = save_pth(tmp_path, tensors)
    convert(path, tmp_path / "half.safetensors", matrix_type="f16")
    loaded = load(tmp_path / "half.safetensors")[1]
    for name, tensor in tensors.items():
        is_matrix = tensor.dim() == 2 and name.endswith(".weight")
        assert torch.equal(loaded[name], tensor.half() if is_matrix else tensor), name
    assert {loaded[name].dtype for name in ("emb.weight", "head.weight")} == {torch.float16}
    tensors["head.weight"][3, 2] = 1e6
    path = save_pth(tmp_path, tensors)
    with pytest.raises(UnsupportedError, match=r"head\.weight holds numbers that torch\.float16 cannot; choose bf16"):
        convert(path, tmp_path / "half.pth", matrix_type="f16")
    assert not (tmp_path / "half.pth").exists()
    with pytest.raises(UsageError, match=r"type .q8_0. .* only for a \.gguf; for pth choose from f32, f16, bf16"):
        convert(path, tmp_path / "half.pth", matrix_type="q8_0")
