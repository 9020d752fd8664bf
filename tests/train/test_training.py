"""The loop learns, resumes bit for bit, and uses the official groups, schedule and loss."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative, relative_error

from fledge.core.errors import CheckpointError, ConfigError, TrainingError, UsageError
from fledge.core.interrupts import Interrupted
from fledge.core.locks import try_lock_folder
from fledge.data.batches import Batch
from fledge.data.windows import Windows
from fledge.models import BaseModel, ModelConfig, build, init_weights
from fledge.models.layers import Linear
from fledge.train import loss as loss_module
from fledge.train.distributed import Distributed
from fledge.train.evaluate import Validation, ValidationText, bits_per_byte, score_documents
from fledge.train.loop import TrainSettings, compute_gradients, prepare, train, windows
from fledge.train.loss import PULL, head_loss, next_token_loss, summed_loss
from fledge.train.memory import keep_freed_memory, return_freed_memory
from fledge.train.metrics import MetricsLogger
from fledge.train.optim import AdamSettings, build_optimizer, parameter_groups, set_learning_rate
from fledge.train.run_checkpoint import RunCheckpoint
from fledge.train.schedule import LearningRateSchedule

CONFIG = ModelConfig.finch(2, 32, vocab_size=40, head_size=8)
TEXT = np.tile(np.arange(1, 38, dtype=np.uint16), 60)


def make_model() -> BaseModel:
    model = build(CONFIG)
    init_weights(model, 0)
    return model


def run(folder: Path, steps: int, total: int = 30, **options: Any) -> tuple[BaseModel, list[dict[str, float]]]:
    """Train with a schedule of `total` steps, and interrupt the run after `steps` of them."""
    model, lines = make_model(), []
    settings = TrainSettings(
        LearningRateSchedule(5e-3, 1e-4, 2, total), accumulate=2, log_every=5, save_every=5, **options
    )
    rows = Windows(TEXT, length=16, batch=3, seed=0)

    def report(line: dict[str, float]) -> None:
        lines.append(line)
        if line["step"] == steps and steps != total:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(model, rows, settings, folder, lambda model: {"bpb": 1.0}, report)
    return model, lines


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "carried": {"window": 6},
    "carried through two": {"window": 6, "tbptt_windows": 2},
    "recomputed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls(tmp_path: Path, mode: str, dtype: torch.dtype | None) -> None:
    _, lines = run(tmp_path, 30, compute_dtype=dtype, **MODES[mode])
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 1.5 and losses[-1] < 0.3 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [line["step"] for line in lines]


def test_interrupted_run_continues_with_the_same_bits(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", 30)
    run(tmp_path / "cut", 15)
    resumed, _ = run(tmp_path / "cut", 30)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert written(tmp_path / "cut") == written(tmp_path / "whole")


def test_weights_of_an_interrupted_update_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole", 30)
    update, updates = torch.optim.AdamW.step, []

    def interrupted(self: torch.optim.AdamW) -> None:
        updates.append(1)
        update(self)
        if len(updates) == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        run(tmp_path / "cut", 30)
    resumed, _ = run(tmp_path / "cut", 30)  # from the checkpoint of step 10: a broken update is not saved
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert written(tmp_path / "cut") == written(tmp_path / "whole")


def written(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


def test_ctrl_c_inside_the_update_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole", 30)
    update, updates = torch.optim.AdamW.step, []

    def interrupted(self: torch.optim.AdamW) -> None:
        updates.append(1)
        if len(updates) == 12:
            signal.raise_signal(signal.SIGINT)
        update(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        run(tmp_path / "cut", 30)
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == 12
    resumed, _ = run(tmp_path / "cut", 30)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert written(tmp_path / "cut") == written(tmp_path / "whole")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_interrupted_validation_is_repeated(tmp_path: Path, at: int) -> None:
    calls: list[int] = []

    def validate(model: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return {"bpb": 1.0}

    settings = TrainSettings(LearningRateSchedule(5e-3, 1e-4, 2, 20), log_every=3, validate_every=7, save_every=100)
    rows = Windows(TEXT, 16, 3, 0)
    with contextlib.suppress(KeyboardInterrupt):
        train(make_model(), rows, settings, tmp_path / "cut", validate)
    train(make_model(), rows, settings, tmp_path / "cut", validate)
    train(make_model(), rows, settings, tmp_path / "whole", lambda model: {"bpb": 1.0})
    assert written(tmp_path / "cut") == written(tmp_path / "whole")
    assert [line["step"] for line in written(tmp_path / "cut") if "bpb" in line] == [7, 14, 20]


def test_second_run_in_the_same_folder_is_rejected(tmp_path: Path) -> None:
    with try_lock_folder(tmp_path) as alone:
        assert alone
        with pytest.raises(TrainingError, match="another run is using"):
            run(tmp_path, 5)


def test_rejected_run_keeps_the_record_of_the_previous_run(tmp_path: Path) -> None:
    settings, rows = TrainSettings(LearningRateSchedule(5e-3, 1e-4, 1, 3)), Windows(TEXT, 16, 3, 0)
    train(make_model(), rows, settings, tmp_path, identity={"data": "a"})
    kept = (tmp_path / "run.json").read_bytes()
    assert json.loads(kept)["settings"]["schedule"]["max_lr"] == 5e-3
    with pytest.raises(CheckpointError, match="another run: data was 'a' and is now 'b'"):
        train(make_model(), rows, settings, tmp_path, identity={"data": "b"})
    assert (tmp_path / "run.json").read_bytes() == kept


def test_infinite_gradient_stops_the_run_before_the_update(tmp_path: Path) -> None:
    model = make_model()
    poison = iter(range(100))

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan") if next(poison) == 6 else gradient

    model.head.weight.register_hook(hook)
    settings = TrainSettings(LearningRateSchedule(5e-3, 1e-4, 2, 30))
    with pytest.raises(TrainingError, match="step 7: the gradient is not finite"):
        train(model, Windows(TEXT, 16, 3, 0), settings, tmp_path, lambda model: {}, lambda line: None)
    again = make_model()
    assert RunCheckpoint(tmp_path, Distributed(), {}).resume(again, build_optimizer(again, AdamSettings()))[0] == 6
    assert all(p.isfinite().all() for p in again.parameters())


def test_full_disk_leaves_the_last_checkpoint_intact(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    whole, _ = run(tmp_path / "whole", 30)
    run(tmp_path / "full", 10)
    kept = (tmp_path / "full" / "last.pt").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, before[1]))
        with pytest.raises(TrainingError, match=r"the checkpoint in .*full cannot be written: .* continues from the"):
            run(tmp_path / "full", 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "full" / "last.pt").read_bytes() == kept
    assert [path.name for path in (tmp_path / "full").iterdir() if path.suffix == ".part"] == []
    resumed, _ = run(tmp_path / "full", 30)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_signals_inside_a_save_do_not_harm_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 5)
    save, saves = torch.save, []

    def interrupted(*arguments: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        save(*arguments)
        saves.append(arguments)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(Interrupted, match="saved at step 11; the same command continues from there") as caught:
        train(
            make_model(),
            Windows(TEXT, 16, 3, 0),
            TrainSettings(LearningRateSchedule(5e-3, 1e-4, 2, 30), save_every=10),
            tmp_path,
        )
    assert caught.value.exit_code == 143 and len(saves) == 2
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 11


def test_second_signal_abandons_the_step(tmp_path: Path) -> None:
    class Slow(Windows):
        def __getitem__(self, number: int) -> Batch:
            for _ in range(2 if number == 4 else 0):
                signal.raise_signal(signal.SIGINT)
            assert number < 5, "one more step was made"
            return super().__getitem__(number)

    with pytest.raises(Interrupted, match="saved at step 4"):
        train(make_model(), Slow(TEXT, 16, 3, 0), TrainSettings(LearningRateSchedule(5e-3, 1e-4, 2, 30)), tmp_path)
    with pytest.raises(Interrupted, match="stopped before the first step"):
        train(
            make_model(),
            Slow(TEXT, 16, 3, 0),
            TrainSettings(LearningRateSchedule(5e-3, 1e-4, 2, 30), accumulate=5),
            tmp_path / "b",
        )


@pytest.mark.parametrize(("broken", "kept"), [(3, None), (7, 5), (10, 5), (30, 25)])
def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int, kept: int | None
) -> None:
    update, updates = torch.optim.AdamW.step, []

    def diverged(self: torch.optim.AdamW) -> None:
        update(self)
        updates.append(1)
        if len(updates) == broken:
            self.param_groups[1]["params"][0].data[7, 0] = math.inf  # of a token that is read

    monkeypatch.setattr(torch.optim.AdamW, "step", diverged)
    then = "start again" if kept is None else f"continue from step {kept}, the last good one"
    with pytest.raises(TrainingError, match=f"after step {broken} the weights are not finite.*not saved; {then}"):
        run(tmp_path, 30)
    assert (tmp_path / "last.pt").exists() == (kept is not None)
    if kept is not None:
        found = torch.load(tmp_path / "last.pt", weights_only=True)
        assert found["step"] == kept and all(tensor.isfinite().all() for tensor in found["model"].values())


def test_resuming_from_non_finite_weights_is_rejected(tmp_path: Path) -> None:
    run(tmp_path, 5)
    found = torch.load(tmp_path / "last.pt", weights_only=True)
    found["model"]["emb.weight"][2, 3] = math.nan
    torch.save(found, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="contains weights that are not finite; move it away"):
        run(tmp_path, 30)


def test_full_disk_for_metrics_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    meter = MetricsLogger(tmp_path / "metrics.jsonl", lambda line: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            meter.write(1, loss=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_file_is_rejected_as_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UsageError, match="run is a file; name a folder for the run"):
        run(tmp_path / "run", 5)


def test_resumed_run_uses_its_own_settings(tmp_path: Path) -> None:
    run(tmp_path, 5)
    model = make_model()
    optimizer = build_optimizer(model, AdamSettings(beta2=0.95, eps=1e-8, weight_decay=0.3))
    assert RunCheckpoint(tmp_path, Distributed(), {}).resume(model, optimizer)[0] == 5
    group = optimizer.param_groups[1]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.3)
    assert optimizer.state_dict()["state"]


def test_invalid_settings_are_rejected() -> None:
    with pytest.raises(ConfigError, match="log_every is 0"):
        TrainSettings(LearningRateSchedule(1.0, 0.1, 1, 5), log_every=0)
    with pytest.raises(ConfigError, match="clip is 0"):
        TrainSettings(LearningRateSchedule(1.0, 0.1, 1, 5), clip=0)
    for peak in (math.inf, math.nan, 11.0, 0.0):
        with pytest.raises(
            ConfigError, match=f"learning rate would fall from {peak:g} to .*0 < min_lr <= max_lr <= 10"
        ):
            LearningRateSchedule(peak, min(peak, 0.1), 1, 5)
    for name, value in (("eps", 0.0), ("eps", 1e-50), ("eps", math.nan), ("weight_decay", math.inf), ("beta2", 1.5)):
        with pytest.raises(ConfigError, match=f"{name} is {value:g}; it must be"):
            AdamSettings(**{name: value})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"junk")
    model = make_model()
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged, so the run cannot continue.*move it away"):
        RunCheckpoint(tmp_path, Distributed(), {}).resume(model, build_optimizer(model, AdamSettings()))


def test_checkpoint_of_another_run_is_rejected(tmp_path: Path) -> None:
    model = make_model()
    optimizer = build_optimizer(model, AdamSettings())
    RunCheckpoint(tmp_path, Distributed(), {"seed": 1, "n_embd": 32}).save(model, optimizer, 3, {})
    with pytest.raises(CheckpointError, match=r"last\.pt belongs to another run: seed was 1 and is now 2"):
        RunCheckpoint(tmp_path, Distributed(), {"seed": 2, "n_embd": 32}).resume(model, optimizer)
    other = build(ModelConfig.finch(2, 40, vocab_size=40, head_size=8))
    with pytest.raises(CheckpointError, match=r"is \(40, 32\) in the checkpoint, \(40, 40\) here"):
        RunCheckpoint(tmp_path, Distributed(), {"seed": 1, "n_embd": 32}).resume(
            other, build_optimizer(other, AdamSettings())
        )
    model.emb.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"other trained parameters; only one side has emb\.weight"):
        RunCheckpoint(tmp_path, Distributed(), {"seed": 1, "n_embd": 32}).resume(
            model, build_optimizer(model, AdamSettings())
        )


def compute_test_gradients(rows: list[Batch], **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model, settings = make_model(), TrainSettings(LearningRateSchedule(1.0, 0.1, 1, 5), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    loss, _ = compute_gradients(prepare(model, settings), rows, settings, Distributed())
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close_relative(found[name], tensor, MODEL_TOLERANCE, name)


ROWS = torch.randint(1, 40, (4, 24), generator=torch.Generator().manual_seed(3))


def test_full_bptt_over_windows_equals_the_gradient_of_the_whole_row() -> None:
    loss, expected = compute_test_gradients([Batch(ROWS)])
    carried, found = compute_test_gradients([Batch(ROWS)], window=7, tbptt_windows=4)
    assert carried == pytest.approx(loss, rel=MODEL_TOLERANCE)
    assert_same_gradients(found, expected)
    cut, other = compute_test_gradients([Batch(ROWS)], window=7, tbptt_windows=1)
    assert cut == pytest.approx(loss, rel=MODEL_TOLERANCE)  # the state is carried all the same
    assert relative_error(other["blocks.0.att.key.weight"], expected["blocks.0.att.key.weight"]) > 1e-3


def test_micro_batches_masks_and_recomputing_give_the_gradient_of_one_batch() -> None:
    counted = torch.rand(4, 23, generator=torch.Generator().manual_seed(1)) < 0.4
    begins = torch.rand(4, 23, generator=torch.Generator().manual_seed(2)) < 0.1
    loss, expected = compute_test_gradients([Batch(ROWS, counted, begins)])
    parts = [Batch(ROWS[a:b], counted[a:b], begins[a:b]) for a, b in ((0, 1), (1, 4))]
    for options in ({}, {"window": 5, "tbptt_windows": 9}, {"activation_checkpointing": True}):
        found_loss, found = compute_test_gradients(parts, **options)
        assert found_loss == pytest.approx(loss, rel=MODEL_TOLERANCE)
        assert_same_gradients(found, expected)


def test_windows_split_the_masks_with_the_ids() -> None:
    batch = Batch(torch.arange(18).view(2, 9), torch.arange(16).view(2, 8) > 3, torch.arange(16).view(2, 8) == 5)
    pieces = list(windows(batch, 3))
    assert [piece.idx[0].tolist() for piece in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8]]
    assert sum(piece.targets for piece in pieces) == batch.targets == 12
    assert [bool(piece.document_start is not None and piece.document_start.any()) for piece in pieces] == [
        False,
        True,
        False,
    ]
    assert len(list(windows(batch, None))) == len(list(windows(batch, 100))) == 1


def test_a_step_without_a_target_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no target that counts"):
        compute_test_gradients([Batch(ROWS, torch.zeros(4, 23, dtype=torch.bool))])


def test_parameter_groups_are_the_official_ones() -> None:
    model = make_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1)}
    assert sum(map(len, groups.values())) == len(names)
    assert groups["fast"] == {f"blocks.{n}.att.time_decay" for n in range(2)}
    matrices = {"emb.weight", "head.weight"}
    for n in range(2):
        matrices |= {f"blocks.{n}.att.{m}.weight" for m in ("receptance", "key", "value", "gate", "output")}
        matrices |= {f"blocks.{n}.ffn.{m}.weight" for m in ("receptance", "key", "value")}
    assert groups["matrices"] == matrices
    assert "blocks.0.att.time_maa_w1" in groups["rest"] and "blocks.1.att.time_faaaa" in groups["rest"]
    optimizer = build_optimizer(model, AdamSettings(weight_decay=0.1))
    set_learning_rate(optimizer, 0.5)
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert settings == {"fast": (1.0, 0.0), "matrices": (0.5, 0.1), "rest": (0.5, 0.0)}


def test_schedule() -> None:
    schedule = LearningRateSchedule(max_lr=1.0, min_lr=0.1, warmup_steps=10, steps=110)
    assert schedule.rate(0) == pytest.approx(0.01)
    assert schedule.rate(10) == pytest.approx(1.0)
    assert schedule.rate(60) == pytest.approx(0.55)
    assert schedule.rate(110) == schedule.rate(10**6) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="warmup_steps < steps"):
        LearningRateSchedule(1.0, 0.1, 5, 5)


def test_l2wrap_pulls_only_the_largest_logit_and_leaves_the_loss_unchanged() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 3))
    loss = next_token_loss(logits, targets)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, plain)
    (with_pull,) = torch.autograd.grad(loss / 4, logits)
    (without,) = torch.autograd.grad(plain / 4, logits)
    pull = torch.zeros_like(logits)
    largest, where = logits.detach().max(-1, keepdim=True)
    pull.scatter_(-1, where, largest * PULL / 6 / 4)
    assert_close_relative(with_pull - without, pull, 1e-11)  # float64, a difference of numbers 4000 times as large


def test_the_score_of_a_document_carries_the_state_over_windows() -> None:
    model = make_model().eval()
    ids = [int(x) for x in TEXT[:50]]
    logits, _ = model(torch.tensor([[0, *ids[:-1]]]))
    expected = torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids), reduction="sum").item()
    for window in (7, 50, 512):
        assert score_documents(model, [ids], window=window) == pytest.approx([expected], rel=MODEL_TOLERANCE)
    assert bits_per_byte(math.log(2) * 80, 10) == pytest.approx(8.0)


def test_documents_of_different_lengths_are_scored_together() -> None:
    model = make_model().eval()
    texts = [[int(x) for x in TEXT[:size]] for size in (30, 3, 17)]
    expected = [score_documents(model, [ids])[0] for ids in texts]
    assert score_documents(model, texts, window=8) == pytest.approx(expected, rel=MODEL_TOLERANCE)
    validate = Validation(
        [
            ValidationText("en", 60.0, texts[0]),
            ValidationText("de", 6.0, texts[1]),
            ValidationText("de", 34.0, texts[2]),
        ],
        rows=2,
    )
    scores = validate(model)
    assert scores["bpb_en"] == pytest.approx(bits_per_byte(expected[0], 60), rel=MODEL_TOLERANCE)
    german = bits_per_byte(expected[1] + expected[2], 40)
    assert scores["bpb_de"] == pytest.approx(german, rel=MODEL_TOLERANCE)
    assert scores["bpb_mean"] == pytest.approx((scores["bpb_en"] + scores["bpb_de"]) / 2)
    limited = Validation([ValidationText("en", 60.0, texts[0]), ValidationText("en", 6.0, texts[1])], size=20.0)
    assert [(text.size, len(text.ids)) for text in limited._selected] == [(20.0, 10)]
    assert Validation([])(model) == {}


def test_masked_targets_affect_neither_the_loss_nor_l2wrap() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets, counted = torch.randint(0, 7, (2, 3)), torch.tensor([[True, False, True], [False, False, True]])
    (masked,) = torch.autograd.grad(summed_loss(logits, targets, counted), logits)
    kept = logits[counted].detach()[None].requires_grad_(True)
    (expected,) = torch.autograd.grad(summed_loss(kept, targets[counted][None]), kept)
    torch.testing.assert_close(masked[counted], expected[0])
    assert masked[~counted].abs().max() == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 3e3])
@pytest.mark.parametrize("masked", [False, True])
def test_chunked_head_loss_equals_the_loss_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, scale: float, masked: bool
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * 37)  # 5 tokens; 2 x 11 is not a multiple of 5
    monkeypatch.setattr(loss_module, "MIN_CHUNK_TOKENS", 2)
    head = Linear(16, 37)
    head.compute_dtype = dtype
    torch.nn.init.normal_(head.weight)
    x = (scale * torch.randn(2, 11, 16)).requires_grad_(True)
    targets = torch.randint(0, 37, (2, 11))
    counted = torch.rand(2, 11) < 0.6 if masked else None
    expected = summed_loss(head(x).float(), targets, counted)
    found = head_loss(head, x, targets=targets, loss_mask=counted)
    # Sums of at most 37 terms in float32: the bound is 37 * 2**-24 = 2.2e-6 on each side. The gradients of a bfloat16
    # product are rounded to bfloat16, by 3.9e-3 of each number, and then added up in another order.
    assert_close_relative(found, expected, 2e-6, "loss")
    tolerance = 2e-6 if dtype is None else 2e-2
    ours = torch.autograd.grad(found / 7, (x, head.weight))
    theirs = torch.autograd.grad(expected / 7, (x, head.weight))
    for a, b in zip(ours, theirs, strict=True):
        assert_close_relative(a, b, tolerance, "gradient")
    with torch.no_grad():
        assert_close_relative(head_loss(head, x, targets=targets, loss_mask=counted), found, 2e-6, "loss")


def test_chunked_head_loss_is_zero_if_all_targets_are_masked() -> None:
    head = Linear(4, 9)
    torch.nn.init.normal_(head.weight)
    x = torch.randn(1, 3, 4, requires_grad=True)
    found = head_loss(
        head, x, targets=torch.zeros(1, 3, dtype=torch.long), loss_mask=torch.zeros(1, 3, dtype=torch.bool)
    )
    assert found.item() == 0.0
    assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(found, (x, head.weight)))


def test_memory_functions_report_support() -> None:
    assert keep_freed_memory() == return_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_checkpoint_with_earlier_names_of_settings_can_be_resumed(tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(tmp_path, Distributed(), {"max_lr": 1e-3, "warmup_steps": 10})
    checkpoint._check(tmp_path, {"identity": {"peak": 1e-3, "warmup": 10}})
    with pytest.raises(CheckpointError, match=r"max_lr was 0\.002 and is now 0\.001"):
        checkpoint._check(tmp_path, {"identity": {"peak": 2e-3, "warmup": 10}})
