"""Adapter files: contents, bases, files of other programs, and merging."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from small_checkpoints import are_equal, make_tensors, save_pth
from torch import Tensor

from fledge.checkpoint import (
    Adapter,
    assemble,
    check_base,
    combine_adapters,
    convert,
    convert_adapter,
    describe_base,
    inspect_adapter,
    load_model,
    load_tuned_state,
    merge_adapters,
    merge_to_file,
    read,
    read_adapter,
    save,
    save_adapter,
)
from fledge.checkpoint.quantization.quantizer import quantize
from fledge.core.errors import CheckpointError, UnsupportedError, UsageError
from fledge.models import BaseModel
from fledge.models.adapters import build_adapted_model, init_factors, select_targets

IDX = torch.tensor([[3, 1, 36, 20, 9]])


def make_lora(
    path: Path, *, rank: int = 4, alpha: float = 6.0, seed: int = 0, full_parameters: tuple[str, ...] = ()
) -> Adapter:
    """Create an untrained LoRA with an effect for the checkpoint at `path`."""
    loaded = read(path)
    model = assemble(loaded.config, loaded.tensors)
    assert isinstance(model, BaseModel)
    generator = torch.Generator().manual_seed(seed)
    factors = init_factors(model, select_targets(loaded.tensors), rank, alpha, seed)
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        tensors |= {
            f"{name}.lora_A": pair.down,
            f"{name}.lora_B": 0.2 * torch.randn(pair.up.shape, generator=generator),
        }
    for name in full_parameters:
        tensors[name] = loaded.tensors[name] + 0.1
    return Adapter("lora", tensors, alpha, describe_base(loaded), path.with_name("adapter.safetensors"), {"steps": 20})


def make_state(path: Path, seed: int = 0) -> Adapter:
    config, generator = read(path).config, torch.Generator().manual_seed(seed)
    shape = (config.n_head, config.head_size, config.head_size)
    tensors = {f"blocks.{i}.att.time_state": torch.randn(shape, generator=generator) for i in range(config.n_layer)}
    return Adapter("state", tensors, None, describe_base(read(path)), path.with_name("state.safetensors"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_pth(tmp_path, make_tensors("6.0"), "base.pth")


def test_a_lora_is_read_back_completely(base: Path, tmp_path: Path) -> None:
    adapter = make_lora(base, full_parameters=("blocks.1.ln2.weight",))
    assert save_adapter(tmp_path / "a.safetensors", adapter) == ()
    reloaded = read_adapter(tmp_path / "a.safetensors")
    assert are_equal(dict(reloaded.tensors), dict(adapter.tensors)) and reloaded.base == adapter.base
    assert (reloaded.kind, reloaded.alpha, reloaded.rank, reloaded.training) == ("lora", 6.0, 4, {"steps": 20})
    assert (
        len(reloaded.targets) == 8
        and list(reloaded.full_parameters) == ["blocks.1.ln2.weight"]
        and reloaded.state == {}
    )
    assert reloaded.factors["blocks.2.ffn.key"].scale == 1.5
    check_base((reloaded,), read(base))


def test_a_state_is_read_back_by_every_reader(base: Path, tmp_path: Path) -> None:
    adapter = make_state(base)
    for name in ("state.safetensors", "state.pth"):
        save_adapter(tmp_path / name, adapter)
        reloaded = read_adapter(tmp_path / name)
        assert reloaded.kind == "state" and reloaded.alpha is None and reloaded.rank == 0
        assert are_equal(reloaded.state, dict(adapter.tensors)) and are_equal(
            load_tuned_state(tmp_path / name), reloaded.state
        )
    assert read_adapter(tmp_path / "state.safetensors").base == adapter.base
    assert read_adapter(tmp_path / "state.pth").base is None


def test_files_of_rwkv_peft_are_read(base: Path, tmp_path: Path) -> None:
    """They have names as in Lightning, bfloat16, full parameters beside the factors, and no alpha."""
    adapter = make_lora(base, full_parameters=("blocks.0.att.time_decay",))
    original = save_pth(tmp_path, {f"model.{name}": t.bfloat16() for name, t in adapter.tensors.items()}, "rwkv-0.pth")
    with pytest.raises(UsageError, match=r"rwkv-0\.pth is a LoRA that does not record its alpha.*--alpha 32"):
        read_adapter(original)
    loaded = read_adapter(original, alpha=6.0)
    assert loaded.tensors.keys() == adapter.tensors.keys() and loaded.base is None
    assert (
        list(loaded.full_parameters) == ["blocks.0.att.time_decay"] and loaded.factors["blocks.0.att.key"].scale == 1.5
    )
    notes = save_adapter(tmp_path / "ours.pth", loaded)
    assert "a .pth cannot hold alpha 6" in notes[0]
    assert are_equal(torch.load(tmp_path / "ours.pth", weights_only=True), dict(loaded.tensors))


def test_adapters_are_inspected_without_weights(base: Path, tmp_path: Path) -> None:
    lora, state = make_lora(base, full_parameters=("ln_out.bias",)), make_state(base)
    peft_tensors = {f"model.{name}": tensor for name, tensor in lora.tensors.items()}
    for path in (save_pth(tmp_path, peft_tensors, "rwkv-0.pth"), tmp_path / "a.pth", tmp_path / "a.safetensors"):
        if path.stem == "a":
            save_adapter(path, lora)
        is_recorded, loaded = path.suffix == ".safetensors", inspect_adapter(path)
        assert loaded is not None and (loaded.kind, loaded.rank, list(loaded.full_parameters)) == (
            "lora",
            4,
            ["ln_out.bias"],
        )
        assert (loaded.alpha, loaded.base) == ((6.0, lora.base) if is_recorded else (None, None))
        assert all(tensor.is_meta for tensor in loaded.tensors.values()) and loaded.nbytes == lora.nbytes
    for path in (tmp_path / "s.pth", tmp_path / "s.safetensors"):
        save_adapter(path, state)
        loaded = inspect_adapter(path)
        assert loaded is not None and loaded.kind == "state" and loaded.nbytes == state.nbytes
    tuned = save_pth(tmp_path, make_tensors("6.0 tuned"), "tuned.pth")  # a whole model, though it has a tuned state
    assert inspect_adapter(base) is inspect_adapter(tuned) is None
    with pytest.raises(UnsupportedError, match="DiSHA"):
        inspect_adapter(save_pth(tmp_path, {"blocks.0.att.key.disha": torch.zeros(4, 24)}, "disha.pth"))


def test_the_chat_template_is_kept_with_the_adapter(base: Path, tmp_path: Path) -> None:
    with_template, without_template = replace(make_lora(base), training={"template": "qa"}), make_state(base)
    save_adapter(tmp_path / "a.safetensors", with_template)
    assert read_adapter(tmp_path / "a.safetensors").template == "qa" and without_template.template is None
    assert "--template qa" in save_adapter(tmp_path / "a.pth", with_template)[1]
    assert (
        combine_adapters([with_template, without_template]).template == "qa"
        and combine_adapters([without_template]).template is None
    )
    assert (
        combine_adapters([with_template, replace(without_template, training={"template": "instruct"})]).template
        == "instruct"
    )
    merge_to_file(base, [with_template], tmp_path / "m.safetensors")
    assert read(tmp_path / "m.safetensors").template == "qa" and read(base).template is None
    merge_to_file(tmp_path / "m.safetensors", [without_template.allow_any_base()], tmp_path / "n.safetensors")
    assert read(tmp_path / "n.safetensors").template == "qa"
    assert "--template qa" in merge_to_file(base, [with_template], tmp_path / "m.pth").notes[-1]


def test_converting_records_a_base(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a.pth", make_lora(base))
    convert_adapter(read_adapter(tmp_path / "a.pth", alpha=6.0), tmp_path / "a.safetensors", base=read(base))
    reloaded = read_adapter(tmp_path / "a.safetensors")
    assert reloaded.base == describe_base(read(base)) and reloaded.alpha == 6.0
    with pytest.raises(CheckpointError, match="exists"):
        convert_adapter(reloaded, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="not an adapter format"):
        convert_adapter(reloaded, tmp_path / "a.bin")
    other = save_pth(tmp_path, make_tensors("6.0", seed=1), "other.pth")
    with pytest.raises(CheckpointError, match="was trained on another model"):
        convert_adapter(reloaded, tmp_path / "b.safetensors", base=read(other))


def test_a_model_has_one_identity_in_every_format(tmp_path: Path) -> None:
    tensors = make_tensors("6.0 in bfloat16")
    path = save_pth(tmp_path, tensors)
    identity = describe_base(read(path)).identity
    for target in (tmp_path / "m.safetensors", tmp_path / "hf", tmp_path / "fla"):
        convert(path, target, to="fla" if target.name == "fla" else None)
        assert describe_base(read(target)).identity == identity, target
    wide = save_pth(tmp_path, {name: tensor.float() for name, tensor in tensors.items()}, "wide.pth")
    with_state = save_pth(tmp_path, make_tensors("6.0 tuned", dtype=torch.bfloat16), "tuned.pth")
    config, plain = read(with_state).config, dict(read(with_state).tensors)
    without = {name: tensor for name, tensor in plain.items() if not name.endswith("time_state")}
    save(tmp_path / "plain.pth", replace(config, tuned_state=False), without)
    assert describe_base(read(wide)).identity == identity
    assert describe_base(read(with_state)).identity == describe_base(read(tmp_path / "plain.pth")).identity != identity


@pytest.mark.parametrize("name", ["emb.weight", "blocks.2.att.time_faaaa", "ln_out.bias"])
def test_a_changed_number_changes_the_identity(base: Path, tmp_path: Path, name: str) -> None:
    tensors = make_tensors("6.0")
    tensors[name].view(-1)[-1] += 1e-3
    assert (
        describe_base(read(save_pth(tmp_path, tensors, "changed.pth"))).identity != describe_base(read(base)).identity
    )


def test_another_base_is_rejected(base: Path, tmp_path: Path) -> None:
    adapter, other = make_lora(base), read(save_pth(tmp_path, make_tensors("6.0", seed=1), "other.pth"))
    with pytest.raises(CheckpointError) as raised:
        check_base((adapter,), other)
    message = str(raised.value)
    assert "\n" not in message and "--any-base" in message and "base (" in message
    assert describe_base(read(base)).identity[:12] in message and describe_base(other).identity[:12] in message
    check_base((adapter.allow_any_base(),), other)


def test_other_sizes_are_rejected_even_for_any_base(base: Path, tmp_path: Path) -> None:
    for tensors, message in (
        (make_tensors("6.0", n_embd=32), r"it is for blocks\.0\.att\.gate of \(24, 24\), here that is \(32, 32\)"),
        (make_tensors("6.0", n_layer=2), r"it changes blocks\.2\.att\.gate, which this model does not have"),
        (make_tensors("5.0"), r"it changes blocks\.0\.att\.gate"),
    ):
        other = read(save_pth(tmp_path, tensors, "other.pth"))
        with pytest.raises(CheckpointError, match=message):
            check_base((make_lora(base).allow_any_base(),), other)
    small = read(save_pth(tmp_path, make_tensors("6.0", n_layer=2), "small.pth"))
    with pytest.raises(CheckpointError, match="is for 3 layers, the model has 2"):
        check_base((make_state(base).allow_any_base(),), small)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks.0.att.key.lora_A": None}, CheckpointError, "only one of its two factors"),
        ({"blocks.0.att.key.lora_A": torch.zeros(3, 24)}, CheckpointError, "do not match"),
        ({"blocks.0.att.query.lora_A": torch.zeros(4, 24)}, CheckpointError, "not for a matrix that Fledge can adapt"),
        ({"blocks.0.att.key.disha": torch.zeros(4, 24)}, UnsupportedError, "DiSHA"),
        ({"emb.weight": torch.zeros(1), "head.weight": torch.zeros(1)}, CheckpointError, "is a whole model"),
        ({"blocks.0.att.key.lora_A": torch.zeros(4, 24, dtype=torch.int8)}, UnsupportedError, "adapters hold floats"),
        ({"model.blocks.0.att.key.lora_A": torch.zeros(4, 24)}, CheckpointError, "twice"),
    ],
)
def test_files_that_are_not_adapters_are_rejected(
    base: Path, tmp_path: Path, change: Any, error: Any, message: str
) -> None:
    tensors = {**make_lora(base).tensors, **change}
    path = save_pth(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, "a.pth")
    with pytest.raises(error, match=message):
        read_adapter(path, alpha=1.0)


def test_damaged_and_contradictory_files_are_rejected(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an adapter: looked for"):
        read_adapter(save_pth(tmp_path, {"a": torch.zeros(2)}, "a.pth"))
    with pytest.raises(CheckpointError, match="is a folder"):
        read_adapter(tmp_path)
    save_adapter(tmp_path / "a.safetensors", make_lora(base))
    with pytest.raises(UsageError, match=r"alpha is 5, but .* was trained with 6"):
        read_adapter(tmp_path / "a.safetensors", alpha=5)
    data = (tmp_path / "a.safetensors").read_bytes()
    for old, new, message in (
        (rb"\"kind\":\"lora\"", rb"\"kind\":\"loop\"", "is damaged"),
        (rb"\"format\":1", rb"\"format\":9", "written by a newer Fledge"),
        (rb"\"alpha\":6.0", rb"\"alpha\":{  ", "is damaged"),
    ):
        assert old in data and len(old) == len(new)
        (tmp_path / "b.safetensors").write_bytes(data.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            read_adapter(tmp_path / "b.safetensors")


def test_a_merged_file_predicts_like_base_and_adapter(base: Path, tmp_path: Path) -> None:
    adapter, state = make_lora(base, full_parameters=("blocks.0.ln1.bias",)), make_state(base)
    merged = merge_to_file(base, [adapter, state], tmp_path / "m.safetensors")
    assert merged.effect > 0.1 > 1e-4 > merged.difference and merged.notes == ()
    loaded, changes = read(base), combine_adapters([adapter, state])
    base_model = load_model(base).model
    assert isinstance(base_model, BaseModel)
    with torch.no_grad():
        adapted_model = build_adapted_model(base_model, changes.factors, changes.full_parameters)
        config, tensors = merge_adapters(loaded, changes).config, merge_adapters(loaded, changes).tensors
        merged_model = load_model(tmp_path / "m.safetensors")
        torch.testing.assert_close(merged_model.model(IDX)[0], assemble(config, tensors)(IDX)[0], rtol=0, atol=0)
        # The adapted model has no tuned state.
        assert not torch.allclose(adapted_model(IDX)[0], merged_model.model(IDX)[0])
    assert merged_model.config.tuned_state and merged_model.extra["merged"][0]["alpha"] == 6.0
    with pytest.raises(CheckpointError, match="exists"):
        merge_to_file(base, [adapter], tmp_path / "m.safetensors")
    assert merge_to_file(base, [adapter], tmp_path / "m.pth").difference < 1e-4


def test_a_failed_merge_leaves_no_files(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.checkpoint.adapters.merging.merge_weight", lambda weight, *_: weight)
    with pytest.raises(CheckpointError, match=r"does not predict.*m\.safetensors was not written"):
        merge_to_file(base, [make_lora(base)], tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["base.pth"]


def test_merging_in_bfloat16_rounds_and_adds_a_note(tmp_path: Path) -> None:
    base = save_pth(tmp_path, make_tensors("6.0 in bfloat16"))
    merged = merge_to_file(base, [make_lora(base)], tmp_path / "m.safetensors")
    assert merged.effect > 0.2 and merged.difference < 0.1 and merged.notes == ()
    weak = make_lora(base)
    weak = replace(weak, alpha=1e-3)
    assert "hides it" in merge_to_file(base, [weak], tmp_path / "n.safetensors").notes[0]


def test_invalid_merges_are_rejected(base: Path, tmp_path: Path) -> None:
    wide = save_pth(tmp_path, make_tensors("6.0", n_embd=64), "wide.pth")
    quantize(wide, tmp_path / "small.safetensors", "int8")
    with pytest.raises(CheckpointError, match="is quantized; merge into the dense model"):
        merge_to_file(tmp_path / "small.safetensors", [make_lora(wide)], tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="convert the file afterwards"):
        merge_to_file(base, [make_lora(base)], tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="both contain a tuned state"):
        combine_adapters([make_state(base), replace(make_state(base), path=Path("other.pth"))])


def test_changed_matrices_of_a_quantized_base_are_expanded(tmp_path: Path) -> None:
    wide = save_pth(tmp_path, make_tensors("6.0", n_embd=64), "wide.pth")
    quantize(wide, tmp_path / "small.safetensors", "int8")
    quantized = read(tmp_path / "small.safetensors")
    adapter = make_lora(wide)
    key_factors = {name: tensor for name, tensor in adapter.tensors.items() if ".ffn.key." in name}
    check_base((adapter,), quantized)  # the file contains the identity of the dense model
    with pytest.raises(CheckpointError, match="was trained on another model"):
        check_base((adapter,), replace(quantized, extra={}))
    merged = merge_adapters(quantized, combine_adapters([replace(adapter, tensors=key_factors)]))
    assert quantized.quantized.keys() - merged.quantized.keys() == {f"blocks.{i}.ffn.key.weight" for i in range(3)}
    full_parameter = {"blocks.0.att.value.weight": read(wide).tensors["blocks.0.att.value.weight"].float() + 1}
    merged_both = merge_adapters(
        quantized, combine_adapters([replace(adapter, tensors={**key_factors, **full_parameter})])
    )
    assert quantized.quantized.keys() - merged_both.quantized.keys() == {
        *full_parameter,
        *(f"blocks.{i}.ffn.key.weight" for i in range(3)),
    }
    assert torch.equal(
        merged_both.tensors["blocks.0.att.value.weight"].float(), full_parameter["blocks.0.att.value.weight"]
    )
    adapted_model = assemble(quantized.config, quantized.dequantize())
    assert isinstance(adapted_model, BaseModel)
    adapted_model = build_adapted_model(
        adapted_model, combine_adapters([replace(adapter, tensors=key_factors)]).factors
    )
    with torch.no_grad():
        logits, expected = assemble(merged.config, merged.dequantize())(IDX)[0], adapted_model(IDX)[0]
    assert_close_relative(logits, expected, MODEL_TOLERANCE, "logits")
