"""The loop learns, resumes bit for bit, and uses the official groups, schedule and loss."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fledge.core.errors import CheckpointError, ConfigError, TrainingError
from fledge.data.tokens import Windows
from fledge.models import ModelConfig, Trunk, build, init_weights
from fledge.train.checkpoint import resume_run
from fledge.train.loop import TrainSettings, train
from fledge.train.loss import PULL, next_token_loss
from fledge.train.memory import keep_freed_memory
from fledge.train.optim import AdamSettings, build_optimizer, parameter_groups, set_learning_rate
from fledge.train.schedule import Schedule
from fledge.train.score import bits_per_byte, document_nats

CONFIG = ModelConfig.finch(2, 32, vocab_size=40, head_size=8)
TEXT = np.tile(np.arange(1, 38, dtype=np.uint16), 60)


def fresh() -> Trunk:
    model = build(CONFIG)
    init_weights(model, 0)
    return model


def run(
    folder: Path, steps: int, total: int = 30, dtype: torch.dtype | None = None
) -> tuple[Trunk, list[dict[str, float]]]:
    """Train for `steps` steps of a schedule of `total`, as a run that is stopped then."""
    model, lines = fresh(), []
    settings = TrainSettings(
        Schedule(5e-3, 1e-4, 2, total), accumulate=2, compute_dtype=dtype, log_every=5, save_every=5
    )
    windows = Windows(TEXT, length=16, batch=3, seed=0)

    def report(line: dict[str, float]) -> None:
        lines.append(line)
        if line["step"] == steps and steps != total:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(model, windows, settings, folder, lambda model: {"bpb": 1.0}, report)
    return model, lines


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_loss_falls(tmp_path: Path, dtype: torch.dtype | None) -> None:
    _, lines = run(tmp_path, 30, dtype=dtype)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 1.5 and losses[-1] < 0.3 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [line["step"] for line in lines]


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", 30)
    run(tmp_path / "cut", 15)
    resumed, _ = run(tmp_path / "cut", 30)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_interrupt_inside_the_update_keeps_the_last_whole_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    resumed, lines = run(tmp_path / "cut", 30)
    assert lines[0]["step"] == 15
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    written = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert written == sorted(written)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights(tmp_path: Path) -> None:
    model = fresh()
    poison = iter(range(100))

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan") if next(poison) == 6 else gradient

    model.head.weight.register_hook(hook)
    settings = TrainSettings(Schedule(5e-3, 1e-4, 2, 30))
    with pytest.raises(TrainingError, match="step 6: the gradient is not finite"):
        train(model, Windows(TEXT, 16, 3, 0), settings, tmp_path, lambda model: {}, lambda line: None)
    again = fresh()
    assert resume_run(tmp_path / "last.pt", again, build_optimizer(again, AdamSettings())) == 6
    assert all(p.isfinite().all() for p in again.parameters())


def test_resuming_takes_the_settings_of_the_new_run(tmp_path: Path) -> None:
    run(tmp_path, 5)
    model = fresh()
    optimizer = build_optimizer(model, AdamSettings(beta2=0.95, eps=1e-8, weight_decay=0.3))
    assert resume_run(tmp_path / "last.pt", model, optimizer) == 5
    group = optimizer.param_groups[1]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.3)
    assert optimizer.state_dict()["state"]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="log_every is 0"):
        TrainSettings(Schedule(1.0, 0.1, 1, 5), log_every=0)
    with pytest.raises(ConfigError, match="clip is 0"):
        TrainSettings(Schedule(1.0, 0.1, 1, 5), clip=0)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"junk")
    model = fresh()
    with pytest.raises(CheckpointError, match=r"last\.pt: cannot resume.*move it away"):
        resume_run(tmp_path / "last.pt", model, build_optimizer(model, AdamSettings()))


def test_parameter_groups_are_the_official_ones() -> None:
    model = fresh()
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
    schedule = Schedule(peak=1.0, final=0.1, warmup=10, steps=110)
    assert schedule.rate(0) == pytest.approx(0.01)
    assert schedule.rate(10) == pytest.approx(1.0)
    assert schedule.rate(60) == pytest.approx(0.55)
    assert schedule.rate(110) == schedule.rate(10**6) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="warmup < steps"):
        Schedule(1.0, 0.1, 5, 5)


def test_l2wrap_pulls_only_the_largest_logit_and_leaves_the_loss() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 3))
    loss = next_token_loss(logits, targets)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert torch.equal(loss, plain)
    (with_pull,) = torch.autograd.grad(loss / 4, logits)
    (without,) = torch.autograd.grad(plain / 4, logits)
    pull = torch.zeros_like(logits)
    largest, where = logits.detach().max(-1, keepdim=True)
    pull.scatter_(-1, where, largest * PULL / 6 / 4)
    torch.testing.assert_close(with_pull - without, pull, rtol=1e-6, atol=1e-12)


def test_document_nats_carries_the_state_over_windows() -> None:
    model = fresh().eval()
    ids = [int(x) for x in TEXT[:50]]
    logits, _ = model(torch.tensor([[0, *ids[:-1]]]))
    expected = torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids), reduction="sum").item()
    for window in (7, 50, 512):
        assert document_nats(model, ids, window=window) == pytest.approx(expected, rel=1e-5)
    assert bits_per_byte(math.log(2) * 80, 10) == pytest.approx(8.0)


def test_keep_freed_memory_answers() -> None:
    assert keep_freed_memory() in (True, False)
