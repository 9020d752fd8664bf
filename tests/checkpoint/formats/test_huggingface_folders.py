"""Hugging Face folders in both layouts, with one or several files, and invalid folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoints import are_equal, make_tensors, save_pth
from torch import Tensor

from fledge.checkpoint import convert, load, read, save
from fledge.checkpoint.formats.fla import from_fla, to_fla
from fledge.checkpoint.formats.huggingface.names import detect_layout, from_hf, to_hf
from fledge.core.errors import CheckpointError, UnsupportedError

# Names in the published folders, written by hand.
HF_NAMES = {
    "emb.weight": "rwkv.embeddings.weight",
    "blocks.0.ln0.bias": "rwkv.blocks.0.pre_ln.bias",
    "blocks.11.ln2.weight": "rwkv.blocks.11.ln2.weight",
    "blocks.0.att.time_mix_k": "rwkv.blocks.0.attention.time_mix_key",
    "blocks.0.att.time_mix_g": "rwkv.blocks.0.attention.time_mix_gate",
    "blocks.3.ffn.time_mix_r": "rwkv.blocks.3.feed_forward.time_mix_receptance",
    "blocks.0.att.time_maa_w1": "rwkv.blocks.0.attention.time_maa_w1",
    "blocks.0.att.time_faaaa": "rwkv.blocks.0.attention.time_faaaa",
    "blocks.0.att.ln_x.weight": "rwkv.blocks.0.attention.ln_x.weight",
    "blocks.2.ffn.value.weight": "rwkv.blocks.2.feed_forward.value.weight",
    "ln_out.weight": "rwkv.ln_out.weight",
    "head.weight": "head.weight",
}


def write_folder(
    path: Path, settings: dict[str, Any], tensors: dict[str, Tensor], file: str = "model.safetensors"
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if file.endswith(".safetensors"):
        save_file(plain, path / file)
    else:
        torch.save(plain, path / file)
    return path


def rename_to_hf(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {to_hf(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(("official", "hf_name"), HF_NAMES.items())
def test_names_are_converted_to_hf_and_back(official: str, hf_name: str) -> None:
    assert to_hf(official) == hf_name and from_hf(hf_name) == official


@pytest.mark.parametrize("kind", ["4", "5.2", "6.0", "6.0 tuned"])
def test_every_name_is_converted_back(kind: str) -> None:
    names = list(make_tensors(kind))
    assert [from_hf(to_hf(name)) for name in names] == names
    assert len({to_hf(name) for name in names}) == len(names)
    assert (detect_layout(names), detect_layout(map(to_hf, names))) == ("official", "hf")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("4", {"model_type": "rwkv"}),
        ("5.2", {"model_type": "rwkv5", "num_attention_heads": 64, "head_size": 8, "intermediate_size": None}),
        ("6.0", {"model_type": "rwkv6", "num_attention_heads": 64, "hidden_size": 24, "num_hidden_layers": 3}),
    ],
)
def test_folders_of_the_remote_code_are_read(kind: str, settings: dict[str, Any], file: str, tmp_path: Path) -> None:
    tensors = make_tensors(kind)
    loaded = read(write_folder(tmp_path / "m", settings, rename_to_hf(tensors), file))
    assert loaded.format == "hf" and loaded.config.version == kind and are_equal(tensors, loaded.tensors)
    assert (loaded.config.norm_eps, loaded.config.group_norm_eps) == (1e-5, 64e-5)


def test_sharded_folders_are_read(tmp_path: Path) -> None:
    tensors = make_tensors("6.0")
    names = list(rename_to_hf(tensors))
    shards = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for file, part in shards.items():
        write_folder(
            tmp_path / "m", {"model_type": "rwkv6"}, {name: rename_to_hf(tensors)[name] for name in part}, file
        )
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = read(tmp_path / "m")
    assert are_equal(tensors, loaded.tensors) and len(loaded.files) == 2
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is not in the folder"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.bin",
        "/etc/passwd",
        "a/b.bin",
        "..",
        "",
        "C:\\x.bin",
        "a\\b.bin",
        ".hidden",
        "a\0b",
        5,
        None,
        ["x"],
        {},
        "x" * 300,
    ],
)
def test_an_index_cannot_name_files_outside_its_folder(name: object, tmp_path: Path) -> None:
    torch.save(rename_to_hf(make_tensors("6.0")), tmp_path / "secret.bin")
    path = write_folder(tmp_path / "m", {"model_type": "rwkv6"}, {"x": torch.zeros(1)}, "other.bin")
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"emb.weight": name}}))
    with pytest.raises(CheckpointError, match="not a plain file name; refused"):
        load(path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    for file in ("a.safetensors", "b.safetensors"):
        write_folder(tmp_path / "m", {"model_type": "rwkv6"}, rename_to_hf(make_tensors("6.0")), file)
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="is in two of its files"):
        load(tmp_path / "m")


def test_a_folder_without_config_lists_its_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json.*; give a \.pth, \.safetensors or \.gguf file"):
        load(tmp_path)
    (tmp_path / "a.pth").touch()
    with pytest.raises(CheckpointError, match=r"has no config\.json.*; give one of its files: a\.pth"):
        load(tmp_path)


def test_a_folder_without_weights_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rwkv5"}')
    with pytest.raises(CheckpointError, match=r"no weights: looked for model\.safetensors, pytorch_model\.bin"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ('{"model_type": "rwkv7"}', UnsupportedError, "RWKV-7 is not supported yet"),
        ('{"model_type": "llama"}', CheckpointError, "model_type is 'llama', which is not an RWKV model"),
        ("[1]", CheckpointError, "not a JSON object"),
        ("{", CheckpointError, "cannot be read as JSON"),
        ("[" * 200_000, CheckpointError, "cannot be read as JSON"),
        ('{"model_type": "rwkv6", "vocab_size": 65536}', CheckpointError, "vocab_size 65536, its tensors say 37"),
        ('{"model_type": "rwkv6", "hidden_size": 32}', CheckpointError, "hidden_size 32, its tensors say 24"),
        ('{"model_type": "rwkv6", "head_size": 64}', CheckpointError, "head_size 64, its tensors say 8"),
        ('{"model_type": "rwkv6", "layer_norm_epsilon": "x"}', CheckpointError, "must be a positive number"),
        ('{"model_type": "rwkv6", "head_size_divisor": 1e200}', CheckpointError, "must be a positive number below"),
    ],
)
def test_invalid_configs_are_rejected(text: str, kind: type[Exception], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "m", {}, rename_to_hf(make_tensors("6.0")))
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(kind, match=message):
        load(tmp_path / "m")


def test_epsilons_come_from_the_config(tmp_path: Path) -> None:
    settings = {"model_type": "rwkv5", "layer_norm_epsilon": 1e-6, "head_size_divisor": 1}
    config, _ = load(write_folder(tmp_path / "m", settings, rename_to_hf(make_tensors("5.2"))))
    assert (config.norm_eps, config.group_norm_eps) == (1e-6, 1e-5)


@pytest.mark.parametrize("to", ["hf", "fla"])
def test_a_changed_epsilon_in_a_written_folder_is_an_error(to: str, tmp_path: Path) -> None:
    """The header of the weights also has the epsilons; a contradiction is an error."""
    tensors = make_tensors("6.0")
    config = replace(load(save_pth(tmp_path, tensors))[0], norm_eps=2e-5, group_norm_eps=3e-4)
    save(tmp_path / "a.safetensors", config, tensors)
    convert(tmp_path / "a.safetensors", tmp_path / "m", to=to)
    path = tmp_path / "m" / "config.json"
    written = json.loads(path.read_text())
    assert load(tmp_path / "m")[0] == config
    eps = "layer_norm_epsilon" if to == "hf" else "norm_eps"
    path.write_text(json.dumps({name: value for name, value in written.items() if name != eps}))
    assert load(tmp_path / "m")[0] == config  # without an epsilon there is no contradiction
    changes = {eps: "norm_eps"} | ({"head_size_divisor": "group_norm_eps"} if to == "hf" else {})
    for name, message in changes.items():
        path.write_text(json.dumps(written | {name: 8}))
        with pytest.raises(CheckpointError, match=rf"config\.json has {message} .*, the header of its weights"):
            load(tmp_path / "m")


@pytest.mark.parametrize("rename", [rename_to_hf, to_fla])
def test_a_tensor_under_two_names_is_an_error(
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    tensors = make_tensors("6.0")
    for name in ("emb.weight", "blocks.1.att.key.weight"):
        duplicate = {name: tensors[name].clone()}
        for duplicated in (rename(tensors) | duplicate, duplicate | rename(tensors)):
            with pytest.raises(CheckpointError, match="official"):
                load(save_pth(tmp_path, duplicated))


def test_missing_tensors_are_reported_by_official_name(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in make_tensors("5.2").items() if name != "blocks.1.att.time_mix_g"}
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.att\.time_mix_g \(1, 1, 24\)"):
        load(write_folder(tmp_path / "m", {"model_type": "rwkv5"}, rename_to_hf(tensors)))


def test_a_single_file_with_hf_names_needs_no_folder(tmp_path: Path) -> None:
    tensors = make_tensors("5.2")
    torch.save(rename_to_hf(tensors), tmp_path / "pytorch_model.bin")
    assert are_equal(tensors, load(tmp_path / "pytorch_model.bin")[1])


@pytest.mark.parametrize("names", [["rwkv.blocks.0.attention.r_k"], ["model.layers.0.attn.r_k"]])
def test_rwkv7_in_any_layout_is_rejected_by_name(names: list[str], tmp_path: Path) -> None:
    tensors = {name: torch.zeros(4, 4) for name in names} | {"rwkv.embeddings.weight": torch.zeros(4, 4)}
    with pytest.raises(UnsupportedError, match="RWKV-7 is not supported yet"):
        load(write_folder(tmp_path / "m", {"model_type": "rwkv6"}, tensors))


FLA_SETTINGS = {"model_type": "rwkv6", "num_heads": 3, "expand_k": 1.0, "hidden_size": 24, "norm_eps": 1e-5}


def test_fla_folders_are_read(tmp_path: Path) -> None:
    tensors = make_tensors("6.0")
    loaded = read(write_folder(tmp_path / "m", FLA_SETTINGS, to_fla(tensors)))
    assert loaded.format == "fla" and are_equal(tensors, loaded.tensors)
    assert loaded.config.group_norm_eps == 64e-5  # independent of norm_eps


def test_fla_is_distinguished_from_the_remote_code_by_names(tmp_path: Path) -> None:
    """Both have the model type rwkv6."""
    settings = {"model_type": "rwkv6", "architectures": ["Rwkv6ForCausalLM"]}
    assert read(write_folder(tmp_path / "a", settings, to_fla(make_tensors("6.0")))).format == "fla"
    assert read(write_folder(tmp_path / "b", settings, rename_to_hf(make_tensors("6.0")))).format == "hf"
    with pytest.raises(CheckpointError, match="num_heads 4, its tensors say 3"):
        load(write_folder(tmp_path / "c", FLA_SETTINGS | {"num_heads": 4}, to_fla(make_tensors("6.0"))))


def test_the_token_shift_of_fla_equals_the_official_one() -> None:
    """The mixes r, w, k, v, g that the library computes equal those of the official layout (equations 14-16)."""
    width, rank = 24, 8
    tensors = {name: tensor.double() for name, tensor in make_tensors("6.0").items()}
    fla = {name.removeprefix("model.layers.1.attn."): tensor for name, tensor in to_fla(tensors).items()}
    x, delta = torch.randn(2, 5, width, dtype=torch.double), torch.randn(2, 5, width, dtype=torch.double)

    low = torch.tanh((x + delta * fla["x_proj.0.mu"]) @ fla["x_proj.0.linear.weight"].t())
    up = fla["x_proj.2.weight"].view(width, 5, rank)
    mixes = torch.einsum("btnr,hnr->btnh", low.view(2, 5, 5, rank), up) + fla["x_bias"]
    r, w, k, v, g = mixes.unbind(-2)

    official = {name.removeprefix("blocks.1.att."): tensor for name, tensor in tensors.items()}
    low = torch.tanh((x + delta * official["time_maa_x"]) @ official["time_maa_w1"]).view(10, 5, rank).transpose(0, 1)
    dynamic = (low @ official["time_maa_w2"]).view(5, 2, 5, width)
    for letter, part, mix in zip("wkvrg", dynamic, (w, k, v, r, g), strict=True):
        torch.testing.assert_close(mix, official[f"time_maa_{letter}"] + part)

    lora = torch.tanh(x @ fla["w_proj.linear.lora.0.weight"].t()) @ fla["w_proj.linear.lora.2.weight"].t()
    expected = official["time_decay"] + torch.tanh(x @ official["time_decay_w1"]) @ official["time_decay_w2"]
    torch.testing.assert_close(lora + fla["w_proj.linear.lora.2.bias"], expected)


def test_fla_tensors_of_impossible_shape_are_named() -> None:
    for name, shape in (
        ("x_bias", (4, 24)),
        ("x_bias", (5,)),
        ("x_proj.2.weight", (24, 41)),
        ("x_proj.2.weight", (3,)),
    ):
        full = f"model.layers.0.attn.{name}"
        with pytest.raises(CheckpointError, match=full.replace(".", r"\.") + "' has the impossible shape"):
            from_fla({full: torch.zeros(shape)})


def test_fla_rejects_tensors_of_several_dtypes() -> None:
    tensors = make_tensors("6.0")
    tensors["blocks.0.att.time_maa_k"] = tensors["blocks.0.att.time_maa_k"].half()
    with pytest.raises(CheckpointError, match="have several dtypes"):
        to_fla(tensors)
