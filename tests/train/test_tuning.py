"""Fine-tuning in every mode: the loss falls, only what should change changes, a run resumes bit for bit."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from random_checkpoints import random_checkpoint
from torch import Tensor

import fledge
from fledge.checkpoint import load_tuned_state, read, read_adapter, save
from fledge.core.errors import CheckpointError, ConfigError, UsageError
from fledge.data.examples import ExampleBatches
from fledge.tokenizer import byte_vocabulary, tokenizer_for
from fledge.train import run_checkpoint
from fledge.train.loss import batch_loss
from fledge.train.tuning.run import TuningResult, TuningRun, compute_mean_loss, prepare
from fledge.train.tuning.settings import LoraSettings, TuneSettings, build_train_settings, build_trainable_model

TOKENIZER = tokenizer_for(byte_vocabulary())
RATES = {"full": 2e-3, "lora": 1e-2, "state": 0.3}
every_mode = pytest.mark.parametrize("mode", RATES)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random Finch in a file of Fledge's own, matrices in bfloat16 as official ones are."""
    torch.save(random_checkpoint("6.0", n_layer=2, n_embd=32, vocab_size=256), tmp_path / "float32.pth")
    found = read(tmp_path / "float32.pth")
    tensors = {name: t.bfloat16() if t.dim() == 2 else t for name, t in found.tensors.items()}
    save(tmp_path / "base.safetensors", found.config, tensors, tokenizer_spec=byte_vocabulary().to_spec())
    return tmp_path / "base.safetensors"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    records: list[Any] = [
        {
            "messages": [
                {"role": "user", "content": f"Say {n}"},
                {"role": "assistant", "content": "tweet " * (1 + n % 3)},
            ]
        }
        for n in range(7)
    ]
    records.append({"text": "tweet tweet tweet"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def get_settings(mode: str, steps: int = 20, **more: Any) -> TuneSettings:
    return TuneSettings(mode, batch=2, accumulate=2, length=64, steps=steps, rate=RATES[mode], seed=3, **more)


def prepared(base: Path, data: Path, settings: TuneSettings, **more: Any) -> TuningRun:
    return prepare(read(base), TOKENIZER, data, settings, device="cpu", **more)


def trained_parameters(
    run: TuningRun, folder: Path, stop_at: int | None = None
) -> tuple[TuningResult | None, list[dict[str, float]]]:
    """Start a run; with `stop_at`, interrupt it when it reports that step."""
    lines: list[dict[str, float]] = []

    def report(line: dict[str, float]) -> None:
        if len(line) > 1:
            lines.append(line)
        if line["step"] == stop_at:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        return run.start(folder, report), lines
    return None, lines


@every_mode
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_steps_lower_the_loss_and_leave_the_base_alone(
    base: Path, data: Path, tmp_path: Path, mode: str, dtype: str
) -> None:
    file, run = base.read_bytes(), prepared(base, data, get_settings(mode), dtype=dtype)
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    first = compute_mean_loss(run.model, run.examples.items)
    done, lines = trained_parameters(run, tmp_path / "run")
    assert done is not None and compute_mean_loss(run.model, run.examples.items) < 0.85 * first
    assert lines[-1]["loss"] < lines[0]["loss"] and [line["step"] for line in lines] == list(range(2, 21, 2))
    for name, weight in run.model.named_parameters():
        trains = mode == "full" or ".lora_" in name or name.endswith("time_state")
        assert weight.requires_grad == trains
        assert torch.equal(weight, before[name]) == (not trains), name
    assert base.read_bytes() == file
    assert all(torch.equal(run.base.tensors[name], tensor) for name, tensor in read(base).tensors.items())


@pytest.mark.parametrize(
    ("version", "mode"),
    [("4", "lora"), ("4", "full"), ("5.0", "lora"), ("5.0", "state"), ("5.2", "lora"), ("5.2", "state")],
)
def test_the_older_versions_are_tuned_too(data: Path, tmp_path: Path, version: str, mode: str) -> None:
    torch.save(random_checkpoint(version, n_layer=2, n_embd=32, vocab_size=256), tmp_path / "base.pth")
    run = prepared(tmp_path / "base.pth", data, get_settings(mode))
    first = compute_mean_loss(run.model, run.examples.items)
    done, _ = trained_parameters(run, tmp_path / "run")
    assert done is not None and compute_mean_loss(run.model, run.examples.items) < 0.85 * first
    example = run.examples.items[0].ids.tolist()
    options = {} if mode == "full" else {"adapter": done.path}
    llm = fledge.load(done.path if mode == "full" else tmp_path / "base.pth", device="cpu", **options)
    found = torch.tensor([score.logprob for score in llm.logprobs(example[1:], context=example[:1])])
    with torch.no_grad():
        logits = run.model(torch.tensor([example[:-1]]))[0][0].log_softmax(-1)
    wanted = logits.gather(1, torch.tensor(example[1:])[:, None])[:, 0]
    assert_close_relative(found, wanted, MODEL_TOLERANCE, "logprobs")


@every_mode
def test_the_result_is_used_as_it_was_trained(base: Path, data: Path, tmp_path: Path, mode: str) -> None:
    run = prepared(base, data, get_settings(mode))
    done, _ = trained_parameters(run, tmp_path / "run")
    assert done is not None
    if mode == "full":
        llm = fledge.load(done.path, device="cpu", dtype="float32")
        assert read(done.path).extra["tuned"]["data"] == "data.jsonl"
        assert read(done.path).tensors["head.weight"].dtype == torch.bfloat16
    else:
        llm = fledge.load(base, device="cpu", dtype="float32", adapter=done.path)
    example = run.examples.items[0].ids.tolist()
    found = torch.tensor([score.logprob for score in llm.logprobs(example[1:], context=example[:1])])
    with torch.no_grad():
        logits, _ = run.model(torch.tensor([example[:-1]]))
    wanted = logits[0].log_softmax(-1).gather(1, torch.tensor(example[1:])[:, None])[:, 0]
    # A full checkpoint is rounded to the base's bfloat16.
    assert_close_relative(found, wanted, 2e-2 if mode == "full" else MODEL_TOLERANCE, "logprobs")


def test_files_record_their_origin(base: Path, data: Path, tmp_path: Path) -> None:
    lora, _ = trained_parameters(
        prepared(base, data, get_settings("lora", 2, lora=LoraSettings(3, 12.0, ("att.key",)))), tmp_path / "a"
    )
    state, _ = trained_parameters(prepared(base, data, get_settings("state", 2)), tmp_path / "b")
    assert lora is not None and state is not None
    adapter = read_adapter(lora.path)
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.targets) == ("lora", 3, 12.0, ("att.key",))
    assert adapter.base is not None and adapter.base.name == "base" and adapter.training["steps"] == 2
    assert read_adapter(state.path).kind == "state" and state.others == (tmp_path / "b" / "state.pth",)
    plain = load_tuned_state(state.others[0])
    assert {tuple(tensor.shape) for tensor in plain.values()} == {(4, 8, 8)}


@every_mode
def test_interrupted_run_continues_with_the_same_bits(base: Path, data: Path, tmp_path: Path, mode: str) -> None:
    whole, cut = prepared(base, data, get_settings(mode)), prepared(base, data, get_settings(mode))
    trained_parameters(whole, tmp_path / "whole")
    assert trained_parameters(cut, tmp_path / "cut", stop_at=8)[0] is None
    again = prepared(base, data, get_settings(mode))
    done, lines = trained_parameters(again, tmp_path / "cut")
    assert done is not None and lines[0]["step"] == 8  # whose line came, but was not yet known to have come
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    if mode != "full":
        assert (
            torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["model"].keys()
            == run_checkpoint.trained_parameters(again.model).keys()
        )


def test_folder_of_another_run_is_rejected(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained_parameters(prepared(base, data, get_settings("lora", 2)), folder)
    for other in (
        get_settings("state", 2),
        get_settings("lora", 2, lora=LoraSettings(rank=3)),
        get_settings("lora", 4),
    ):
        with pytest.raises(CheckpointError, match=r"belongs to another run: \w+ was .* choose another folder"):
            prepared(base, data, other).start(folder, lambda line: None)
    kept = (folder / "run.json").read_text()
    (tmp_path / "other.jsonl").write_text('{"text": "tweet"}\n')
    with pytest.raises(CheckpointError, match="another run: data was"):
        prepared(base, tmp_path / "other.jsonl", get_settings("lora", 2)).start(folder, lambda line: None)
    assert (folder / "run.json").read_text() == kept
    prepared(base, data, replace(get_settings("lora", 2), rate=1e-3)).start(folder, lambda line: None)  # the rate may


def test_selected_parameters_are_trained_with_a_lora(base: Path, data: Path, tmp_path: Path) -> None:
    settings = get_settings("lora", lora=LoraSettings(parts=("time", "ln")))
    run = prepared(base, data, settings)
    done, _ = trained_parameters(run, tmp_path / "run")
    assert done is not None
    parts = read_adapter(done.path).full_parameters
    assert {"blocks.1.att.time_maa_w2", "ln_out.bias", "blocks.0.ln0.weight", "blocks.1.att.ln_x.bias"} <= parts.keys()
    assert not any(name.endswith("key.weight") for name in parts)
    assert not torch.equal(parts["ln_out.bias"], read(base).tensors["ln_out.bias"])
    with pytest.raises(UsageError, match="no parameter has 'tome' in its name"):
        build_trainable_model(read(base), get_settings("lora", lora=LoraSettings(parts=("tome",))))


def test_tuned_state_can_be_tuned_again(base: Path, data: Path, tmp_path: Path) -> None:
    done, _ = trained_parameters(prepared(base, data, get_settings("state", 5)), tmp_path / "run")
    assert done is not None
    found, state = read(base), load_tuned_state(done.path)
    with_state = replace(found, config=replace(found.config, tuned_state=True), tensors={**found.tensors, **state})
    model = build_trainable_model(with_state, get_settings("state"))
    assert torch.equal(model.get_parameter("blocks.1.att.time_state"), state["blocks.1.att.time_state"])


def test_unsupported_checkpoints_cannot_be_tuned(base: Path, data: Path, tmp_path: Path) -> None:
    torch.save(random_checkpoint("4", n_layer=1, n_embd=16, vocab_size=256), tmp_path / "old.pth")
    with pytest.raises(fledge.FledgeError, match="RWKV-4 model, which has no matrix state"):
        build_trainable_model(read(tmp_path / "old.pth"), get_settings("state"))
    with pytest.raises(UsageError, match="float16 overflows in training"):
        prepared(base, data, get_settings("lora"), dtype="float16")
    with pytest.raises(ConfigError, match="mode 'half' is unknown"):
        TuneSettings("half")
    with pytest.raises(ConfigError, match="both must be above 0"):
        TuneSettings("lora", epochs=0)
    with pytest.raises(ConfigError, match="both must be at least 1"):
        TuneSettings("lora", batch=0)


def test_steps_and_rates() -> None:
    settings = TuneSettings("state", batch=4, accumulate=2, epochs=3)
    assert settings.count_steps(10) == 15 and replace(settings, steps=7).count_steps(10) == 7
    schedule = settings.schedule(200)
    assert (schedule.max_lr, schedule.min_lr, schedule.warmup_steps) == (1.0, 0.01, 10)
    assert replace(settings, rate=0.5).schedule(5).min_lr == 0.005 and settings.schedule(5).warmup_steps == 0
    full = TuneSettings("full").schedule(100)
    assert full.rate(50) == full.rate(99) == 1e-5
    assert build_train_settings(settings, 200).adam.weight_decay == 0.0


@every_mode
def test_estimated_memory_is_close_to_the_tensors_of_autograd(base: Path, data: Path, mode: str) -> None:
    """Between what a forward pass keeps for the gradients, and half as much again with all gradients beside it."""
    run = prepared(base, data, get_settings(mode))
    batches, kept = run.batches, dict[int, Tensor]()
    largest = batches[max(range(batches.per_epoch), key=batches.sizes.__getitem__)]
    weights = {weight.untyped_storage().data_ptr() for weight in run.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch_loss(run.model, largest)
    forward = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    cost = run.estimate()
    assert forward < cost.batch < 1.5 * forward + 4 * cost.trained


def test_estimated_time_is_all_steps_at_the_measured_speed(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that says that the trial took three seconds, one for each of its batches."""
    run, clock = prepared(base, data, get_settings("lora")), iter([10.0, 13.0])
    monkeypatch.setattr("fledge.train.tuning.estimate.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    seconds = run.estimate().seconds
    per_batch = [3 * (size - 2) / sum(size - 2 for size in run.batches.sizes[:3]) for size in run.batches.sizes]
    whole = 20 * 2 * sum(per_batch) / len(per_batch)
    assert 0.99 * whole < seconds < 1.1 * whole


def test_estimate_contains_weights_optimizer_and_batch(base: Path, data: Path) -> None:
    costs = {mode: prepared(base, data, get_settings(mode)).estimate() for mode in RATES}
    assert costs["state"].trained == 2 * 4 * 8 * 8
    assert costs["full"].optimizer == 8 * costs["full"].trained > costs["lora"].optimizer > costs["state"].optimizer
    for cost in costs.values():
        assert cost.memory == cost.weights + cost.optimizer + cost.batch
    run = prepared(base, data, get_settings("lora"))
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    run.estimate()
    assert all(
        torch.equal(weight, before[name]) and weight.grad is None for name, weight in run.model.named_parameters()
    )


def test_validation_is_the_mean_over_all_that_counts(base: Path, data: Path, tmp_path: Path) -> None:
    run = prepared(base, data, get_settings("lora", 2), validate=data)
    losses: list[Tensor] = []
    with torch.no_grad():
        for example in run.examples.items:
            logits, _ = run.model(torch.from_numpy(example.ids[None, :-1].astype(np.int64)))
            wanted = torch.from_numpy(example.ids[1:].astype(np.int64))
            each = torch.nn.functional.cross_entropy(logits[0], wanted, reduction="none")
            losses.append(each[torch.from_numpy(example.loss_mask[1:])])
    assert compute_mean_loss(run.model, run.examples.items, 3) == pytest.approx(
        float(torch.cat(losses).mean()), rel=MODEL_TOLERANCE
    )
    _, lines = trained_parameters(run, tmp_path / "run")
    assert "validation_loss" in lines[-1]
    assert len(ExampleBatches(run.examples.items, 2, 0)[0].idx) == 2
