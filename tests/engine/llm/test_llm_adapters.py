"""Adapters of a loaded model: merged for the native library, separate elsewhere, shared bases, and tuned states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from fakes import equal_states
from random_checkpoints import random_checkpoint
from torch import Tensor

import fledge
from fledge import checkpoint
from fledge.checkpoint import Adapter, describe_base, read, save_adapter
from fledge.core.errors import CheckpointError, UsageError
from fledge.engine import LLM
from fledge.models.native_model import NativeModel
from fledge.native.library import library

VOCAB = 256
TEXT = "It was a dark night"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.pth"
    torch.save(random_checkpoint("6.0", n_layer=2, n_embd=32, vocab_size=VOCAB), path)
    return path


def write_lora(base: Path, name: str, seed: int = 0, parts: tuple[str, ...] = ()) -> Path:
    found, draw = read(base), torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for target in ("att.key", "ffn.value"):
            n_out, n_in = found.tensors[f"blocks.{layer}.{target}.weight"].shape
            tensors[f"blocks.{layer}.{target}.lora_A"] = torch.randn(3, n_in, generator=draw) * n_in**-0.5
            tensors[f"blocks.{layer}.{target}.lora_B"] = torch.randn(n_out, 3, generator=draw) * 0.3
    tensors |= {part: found.tensors[part] + 0.2 for part in parts}
    path = base.with_name(f"{name}.safetensors")
    save_adapter(path, Adapter("lora", tensors, 6.0, describe_base(found), path))
    return path


def write_state(base: Path, name: str, seed: int = 0) -> Path:
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"blocks.{layer}.att.time_state": torch.randn(4, 8, 8, generator=draw) for layer in range(2)}
    path = base.with_name(f"{name}.safetensors")
    save_adapter(path, Adapter("state", tensors, None, describe_base(read(base)), path))
    return path


def logprobs(llm: LLM) -> Tensor:
    """The log probabilities of a text after the model's initial state."""
    return torch.tensor([score.logprob for score in llm.logprobs(TEXT[1:], context=TEXT[:1])])


def test_native_and_torch_agree_with_an_adapter(base: Path) -> None:
    lora = write_lora(base, "lora", parts=("blocks.0.ln1.bias", "blocks.1.att.time_decay"))
    state = write_state(base, "state")
    plain = fledge.load(base, device="cpu")
    for adapter in ([lora], [state], [lora, state]):
        fast = fledge.load(base, device="cpu", adapter=adapter)
        slow = fledge.load(base, device="cpu", pack=False, adapter=adapter)
        assert_close_relative(logprobs(fast), logprobs(slow), MODEL_TOLERANCE, "logprobs")
        assert (logprobs(slow) - logprobs(plain)).abs().max() > 0.05
        assert fast.generate(TEXT, max_tokens=6, seed=1).ids == slow.generate(TEXT, max_tokens=6, seed=1).ids
        assert isinstance(fast.model, NativeModel) == (library() is not None)


def test_merged_checkpoint_agrees_with_the_adapters(base: Path, tmp_path: Path) -> None:
    files = [write_lora(base, "lora"), write_state(base, "state")]
    checkpoint.merge_to_file(base, [checkpoint.read_adapter(file) for file in files], tmp_path / "m.safetensors")
    together = fledge.load(tmp_path / "m.safetensors", device="cpu")
    apart = fledge.load(base, device="cpu", adapter=files)
    assert_close_relative(logprobs(together), logprobs(apart), MODEL_TOLERANCE, "logprobs")


def test_several_adapters_share_the_weights_of_one_base(base: Path) -> None:
    llm = fledge.load(base, device="cpu", pack=False)
    before = logprobs(llm)
    poet, coder = llm.with_adapter(write_lora(base, "poet")), llm.with_adapter(write_lora(base, "coder", seed=1))
    calm = llm.with_adapter(write_state(base, "calm"))
    for other in (poet, coder, calm):
        assert other.model.state_dict()["head.weight"].data_ptr() == llm.model.state_dict()["head.weight"].data_ptr()
        assert (logprobs(other) - before).abs().max() > 0.05 and other.name == "base"
    assert torch.equal(logprobs(llm), before) and not torch.allclose(logprobs(poet), logprobs(coder))
    both = fledge.load(base, device="cpu", pack=False, adapter=[write_lora(base, "poet"), write_state(base, "calm")])
    together = poet.with_adapter(write_state(base, "calm"))
    assert_close_relative(logprobs(together), logprobs(both), MODEL_TOLERANCE, "logprobs")
    assert not torch.allclose(logprobs(poet.with_adapter(write_lora(base, "coder", seed=1))), logprobs(poet))


def test_tuned_state_is_the_initial_state_of_every_text(base: Path) -> None:
    llm = fledge.load(base, device="cpu")
    calm = llm.with_adapter(write_state(base, "calm"))
    assert calm.model is llm.model and calm.initial_state is not None
    chat = calm.chat()
    assert equal_states(chat.state, calm.initial_state) and equal_states(calm.read(""), calm.initial_state)
    other = calm.with_adapter(write_state(base, "other", seed=1))
    assert other.initial_state is not None and not equal_states(other.initial_state, calm.initial_state)
    after = llm.read(TEXT)  # a state argument takes precedence
    assert (
        calm.generate("x", state=after, max_tokens=3, seed=1).ids
        == llm.generate("x", state=after, max_tokens=3, seed=1).ids
    )


@pytest.mark.skipif(library() is None, reason="needs the native library")
def test_native_model_accepts_a_lora_only_while_loading(base: Path) -> None:
    with pytest.raises(UsageError, match=r"base uses the native library.*pack=False"):
        fledge.load(base, device="cpu").with_adapter(write_lora(base, "lora"))


def test_quantize_while_loading_with_an_adapter(base: Path) -> None:
    lora = write_lora(base, "lora")
    exact, rounded = (fledge.load(base, device="cpu", adapter=lora, quant=quant) for quant in (None, "int8"))
    assert 0 < (logprobs(exact) - logprobs(rounded)).abs().max() < 0.2


def test_adapter_of_another_base_is_rejected_unless_forced(base: Path, tmp_path: Path) -> None:
    lora = write_lora(base, "lora")
    other = tmp_path / "other.pth"
    torch.save(random_checkpoint("6.0", n_layer=2, n_embd=32, vocab_size=VOCAB, seed=1), other)
    with pytest.raises(CheckpointError, match="was trained on another model: base"):
        fledge.load(other, device="cpu", adapter=lora)
    with pytest.raises(CheckpointError, match="was trained on another model: base"):
        fledge.load(other, device="cpu", pack=False).with_adapter(lora)
    fledge.load(other, device="cpu", adapter=checkpoint.read_adapter(lora).allow_any_base())


def test_chat_uses_the_template_of_the_adapter(base: Path, tmp_path: Path) -> None:
    state = checkpoint.read_adapter(write_state(base, "state"))
    qa, instruct = (replace(state, training={"template": name}) for name in ("qa", "instruct"))
    plain = fledge.load(base, device="cpu")
    assert plain.template is None and plain.chat().template.name == "world"
    assert plain.with_adapter(qa).chat().template.name == fledge.load(base, device="cpu", adapter=qa).template == "qa"
    assert plain.with_adapter(qa).with_adapter(state).template == "qa"  # the second adapter records no template
    assert plain.with_adapter(qa).with_adapter(instruct).chat().template.name == "instruct"
    assert plain.with_adapter(qa).chat(template="world").template.name == "world"
    checkpoint.merge_to_file(base, [qa], tmp_path / "m.safetensors")
    merged = fledge.load(tmp_path / "m.safetensors", device="cpu")
    assert (
        merged.chat().template.name == "qa"
        and "".join(merged.chat().template.open_turn("x")) == "Question: x\n\nAnswer:"
    )


def test_two_tuned_states_are_rejected(base: Path) -> None:
    with pytest.raises(UsageError, match="both contain a tuned state"):
        fledge.load(base, device="cpu", adapter=[write_state(base, "one"), write_state(base, "two")])


def test_adapter_is_checked_against_the_weights_in_memory(base: Path) -> None:
    llm = replace(fledge.load(base, device="cpu", pack=False), source="")
    assert not torch.allclose(logprobs(llm.with_adapter(write_lora(base, "lora"))), logprobs(llm))
    llm.model.get_parameter("emb.weight").data[0, 0] += 1
    with pytest.raises(CheckpointError, match="was trained on another model"):
        llm.with_adapter(write_lora(base, "lora"))
