"""The training loop, to be read from top to bottom: one device, gradient accumulation, resume, validation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fledge.core.errors import ConfigError, TrainingError
from fledge.data.batches import Batch, Batches
from fledge.data.tokens import Windows
from fledge.models import Trunk
from fledge.models.layers import Linear
from fledge.train.checkpoint import resume_run, save_run
from fledge.train.loss import masked_loss
from fledge.train.optim import AdamSettings, build_optimizer, set_learning_rate
from fledge.train.schedule import Schedule


@dataclass(frozen=True)
class TrainSettings:
    """One run. `windows` gives micro-batches; `accumulate` of them make a step."""

    schedule: Schedule
    adam: AdamSettings = field(default_factory=AdamSettings)
    accumulate: int = 1
    clip: float = 1.0
    compute_dtype: torch.dtype | None = None  # dtype of the matrix products; None is the weights' own float32
    log_every: int = 10  # steps
    save_every: int = 100  # steps
    validate_every: int = 200  # steps

    def __post_init__(self) -> None:
        for name in ("accumulate", "log_every", "save_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.clip > 0:
            raise ConfigError(f"clip is {self.clip}; it must be above 0")


def train(
    model: Trunk,
    windows: Windows | Batches,
    settings: TrainSettings,
    folder: Path,
    validate: Callable[[Trunk], dict[str, float]],
    report: Callable[[dict[str, float]], None],
) -> None:
    """Train `model` in place until the schedule ends, going on from folder/last.pt if there is one.

    Every line of folder/metrics.jsonl is also given to `report`. An interrupt, or any other end, saves the last whole
    step first. Raises TrainingError when a gradient is not finite, before it touches the weights.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.compute_dtype = settings.compute_dtype
    optimizer = build_optimizer(model, settings.adam)
    step = resume_run(folder / "last.pt", model, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    meter = Meter(folder / "metrics.jsonl", step, report)
    whole = True  # False while weights and step number do not belong together
    try:
        while step < settings.schedule.steps:
            loss, norm, tokens = gradients(model, windows, settings, step)
            whole = False
            set_learning_rate(optimizer, settings.schedule.rate(step))
            optimizer.step()
            step += 1
            whole = True
            meter.add(loss, tokens)
            if step % settings.log_every == 0:
                meter.write(step, norm=norm, rate=settings.schedule.rate(step - 1))
            if step % settings.validate_every == 0 or step == settings.schedule.steps:
                meter.write(step, **validate(model))
            if step % settings.save_every == 0:
                save_run(folder / "last.pt", model, optimizer, step)
    finally:
        if whole:
            save_run(folder / "last.pt", model, optimizer, step)


def gradients(model: Trunk, windows: Windows | Batches, settings: TrainSettings, step: int) -> tuple[float, float, int]:
    """Forward and backward over `accumulate` micro-batches, then clip. Returns mean loss, gradient norm and tokens."""
    loss_sum, first = 0.0, step * settings.accumulate
    model.zero_grad(set_to_none=True)
    found = [windows[number] for number in range(first, first + settings.accumulate)]
    batches = [one if isinstance(one, Batch) else Batch(torch.from_numpy(one)) for one in found]
    sizes = [one.idx[:, 1:].numel() if one.counted is None else int(one.counted.sum()) for one in batches]
    device = model.emb.weight.device
    for batch in batches:
        idx = batch.idx.to(device)
        counted = None if batch.counted is None else batch.counted.to(device)
        logits, _ = model(idx[:, :-1])  # (B, T, vocab)
        loss = masked_loss(logits, idx[:, 1:], counted, sum(sizes))
        loss.backward()
        loss_sum += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
    if not math.isfinite(norm):
        raise TrainingError(
            f"step {step}: the gradient is not finite (loss {loss_sum:.3g}); the last good weights are saved. "
            "Go on from them with a lower learning rate, or see the published remedies for loss spikes"
        )
    return loss_sum, norm, sum(batch.idx[:, 1:].numel() for batch in batches)


class Meter:
    """Collects losses between two lines of the metrics file. A resumed run drops the lines it is about to repeat."""

    def __init__(self, path: Path, step: int, report: Callable[[dict[str, float]], None]) -> None:
        self.path, self.report = path, report
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
            path.write_text("".join(kept))
        self.losses: list[float] = []
        self.tokens = 0
        self.since = time.perf_counter()

    def add(self, loss: float, tokens: int) -> None:
        """One step's loss, and how many tokens it was made of."""
        self.losses.append(loss)
        self.tokens += tokens

    def write(self, step: int, **values: float) -> None:
        """Append one line: the step, the mean loss and speed since the last line if any steps were made, `values`."""
        line: dict[str, float] = {"step": step}
        if self.losses:
            elapsed = time.perf_counter() - self.since
            line |= {"loss": sum(self.losses) / len(self.losses), "tokens_per_s": self.tokens / elapsed}
        line |= values
        with open(self.path, "a") as file:
            file.write(json.dumps({name: float(f"{value:.6g}") for name, value in line.items()}) + "\n")
        self.report(line)
        self.losses, self.tokens, self.since = [], 0, time.perf_counter()
