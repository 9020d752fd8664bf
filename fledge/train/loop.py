"""The training loop, from top to bottom: rows, windows with carried state, accumulation, update, metrics.

The loss of a step is the mean over all its counted targets, for any division into rows, windows and processes. With
`window`, a row is read in pieces and the state is passed on (truncated backpropagation through time): the gradient
flows back through `tbptt_windows` pieces, so memory does not depend on the length of the rows. Everything else is a
function of the step number or in the checkpoint, so a killed run continues with the bits of an uninterrupted one.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fledge.core.errors import ConfigError, TrainingError, UsageError
from fledge.core.files import write_json
from fledge.core.interrupts import Interrupted, StopRequest, catch_signals
from fledge.core.locks import try_lock_folder
from fledge.data.batches import Batch, Batches
from fledge.kernels import prepare_tracing
from fledge.models import State
from fledge.models.layers import set_compute_dtype
from fledge.train.distributed import Distributed, whole
from fledge.train.loss import batch_loss
from fledge.train.memory import return_freed_memory
from fledge.train.metrics import MetricsLogger, Report
from fledge.train.optim import AdamSettings, build_optimizer, set_learning_rate
from fledge.train.run_checkpoint import RunCheckpoint, SaveError
from fledge.train.schedule import LearningRateSchedule


@dataclass(frozen=True)
class TrainSettings:
    """One run. `batches` gives micro-batches for all processes together; `accumulate` of them make a step."""

    schedule: LearningRateSchedule
    adam: AdamSettings = field(default_factory=AdamSettings)
    accumulate: int = 1
    clip: float = 1.0
    compute_dtype: torch.dtype | None = None  # dtype of the matrix products; None is the weights' own float32
    window: int | None = None  # tokens of a piece; the state is passed on to the next piece; None: whole rows
    tbptt_windows: int = 1  # windows that a gradient flows back through
    activation_checkpointing: bool = False  # recompute the blocks for the gradient: less memory
    compile: bool = False  # the two halves of each block, by torch.compile; needs a C++ compiler or a GPU with triton
    log_every: int = 10  # steps
    save_every: int = 100  # steps
    validate_every: int = 200  # steps

    def __post_init__(self) -> None:
        for name in ("accumulate", "window", "tbptt_windows", "log_every", "save_every", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.clip < math.inf:
            raise ConfigError(f"clip is {self.clip}; it must be a number above 0")


class NotFinite(TrainingError):
    """A gradient is not finite. All processes detect it in the same step."""


Validate = Callable[[Any], dict[str, float]]

RECORD = "run.json"
"""The settings and the data of a run, for people. It is never read back."""


def train(
    model: nn.Module,
    batches: Batches,
    settings: TrainSettings,
    folder: Path,
    validate: Validate = lambda model: {},
    report: Report = lambda line: None,
    *,
    team: Distributed = Distributed(),  # noqa: B008 - a value, never changed
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Train the parameters of `model` that require a gradient, in place, until the schedule ends.

    Continues from the checkpoint in `folder` if there is one. The main process also passes every line of
    folder/metrics.jsonl to `report`; if a run continues, the first line contains only the step. identity: plain values
    that must be the same when a run continues; folder/run.json contains them and the settings.

    SIGINT and SIGTERM end the run after the current step, which is saved, and raise Interrupted; a single process
    abandons the step at the second signal. Any other error saves the last complete step first, unless one of several
    processes fails alone. Raises TrainingError if a gradient is not finite, before the update of the weights, and
    CheckpointError for a checkpoint of another run.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder for the run")
    folder.mkdir(parents=True, exist_ok=True)
    with try_lock_folder(folder) if team.is_main else nullcontext(True) as alone:
        if not alone:
            raise TrainingError(f"another run is using {folder}; choose another folder, or wait until it ends")
        called = team.wrap(prepare(model, settings))
        optimizer = build_optimizer(model, settings.adam)
        saved = RunCheckpoint(folder, team, identity or {})
        step, held = saved.resume(model, optimizer)
        if team.is_main:
            write_json(folder / RECORD, {"settings": _plain(settings), **(identity or {})})
        meter = MetricsLogger(folder / "metrics.jsonl", report, writes=team.is_main)
        meter.rewind(step, held)
        if 0 < step < settings.schedule.steps and team.is_main:
            report({"step": step})
        with catch_signals(always_defer=team.world > 1) as stop:
            now = _Progress(model, optimizer, saved, meter, stop, step)
            tell = partial(_tell, meter, settings, partial(validate, called), stop)
            with now.kept():
                tell(now.step)  # lines that an interrupt has prevented
                while now.step < settings.schedule.steps:
                    parts = range(now.step * settings.accumulate, (now.step + 1) * settings.accumulate)
                    loss, targets = gradients(called, [team.shard(batches[part]) for part in parts], settings, team)
                    norm = clip(model, settings.clip, now.step, loss)
                    rate = settings.schedule.rate(now.step)
                    set_learning_rate(optimizer, rate)
                    with now.changing():
                        optimizer.step()
                        now.step += 1
                        meter.add(loss, targets, norm=norm, rate=rate)
                    if number := team.largest(stop.number):
                        raise Interrupted(number)
                    tell(now.step)
                    if now.step % settings.save_every == 0 or now.step == settings.schedule.steps:
                        now.save()


@dataclass
class _Progress:
    """The progress of a run, which is saved when the run ends for any reason."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    saved: RunCheckpoint
    meter: MetricsLogger
    stop: StopRequest
    step: int  # completed steps
    whole: bool = True  # False while the weights and the number of steps do not match

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Context of the update of the weights."""
        with self.stop.defer():
            self.whole = False
            yield
            self.whole = True

    def save(self) -> None:
        """All processes call it."""
        with self.stop.defer():
            self.saved.save(self.model, self.optimizer, self.step, self.meter.pending())

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Save the progress if the block ends with an error. If one of several processes fails alone, it does not save,
        because it would wait for the others.
        """
        team = self.saved.team
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            together = team.world == 1 or isinstance(error, Interrupted | NotFinite)
            if together and self.whole and not isinstance(error, SaveError):
                self.save()
            if isinstance(error, KeyboardInterrupt):
                number = getattr(error, "number", signal.SIGINT)
                raise Interrupted(number, _kept(self.saved.written) if team.is_main else "") from None
            raise


def _kept(step: int) -> str:
    if not step:
        return "stopped before the first step was done; nothing is saved"
    return f"saved at step {step}; the same command continues from there"


def _plain(settings: TrainSettings) -> dict[str, Any]:
    return {**asdict(settings), "compute_dtype": str(settings.compute_dtype or torch.float32).removeprefix("torch.")}


def _tell(
    meter: MetricsLogger,
    settings: TrainSettings,
    validate: Callable[[], dict[str, float]],
    stop: StopRequest,
    step: int,
) -> None:
    """Write the lines that are due after a step: all or none of them, each once."""
    if step == meter.told:
        return
    validation: dict[str, float] = {}
    if step % settings.validate_every == 0 or step == settings.schedule.steps:
        with stop.defer(0):  # may be interrupted: a continued run repeats the validation
            validation = validate()
            return_freed_memory()
    with stop.defer():
        if step % settings.log_every == 0:
            meter.write(step, **meter.update)
        if validation:
            meter.write(step, **validation)
        meter.told = step


def prepare(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """Set the dtype of the products, and apply compilation and activation checkpointing to each block."""
    set_compute_dtype(model, settings.compute_dtype)
    blocks: Any = model.blocks
    if settings.compile:
        prepare_tracing()
    for block in blocks:
        if settings.compile:
            # Not the block itself: its layer number would compile a separate program for each.
            block.att.compile(dynamic=False)
            block.ffn.compile(dynamic=False)
        if settings.activation_checkpointing and not isinstance(block.forward, partial):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def gradients(called: nn.Module, micro: list[Batch], settings: TrainSettings, team: Distributed) -> tuple[float, int]:
    """Forward and backward over a step's rows. Returns the mean loss and the number of targets, over all processes."""
    # If several backward passes add up, gradients keep their memory. Allocated in the middle of a step, they would
    # fill the gaps between activations, and the next pass would need more (5 % at rows of 65,536 tokens).
    adds_up = len(micro) > 1 or any(_passes(batch, settings) > 1 for batch in micro)
    called.zero_grad(set_to_none=not adds_up)
    targets = team.total(float(sum(batch.targets for batch in micro)))
    if not targets:
        raise TrainingError("a step has no target that counts; every example's answer may have been cut off")
    # Gradients are averaged over the processes, and the sums of a process are over its own rows only.
    weight = team.world / targets
    loss = sum(backward(called, batch, weight, settings, team, last=batch is micro[-1]) for batch in micro)
    return team.total(loss) / team.world, int(targets)


def backward(
    called: nn.Module, batch: Batch, weight: float, settings: TrainSettings, team: Distributed, *, last: bool
) -> float:
    """One micro-batch, window by window. last: the processes exchange their gradients after it."""
    state: State | None = None
    pending: Tensor | None = None
    total = 0.0
    pieces = list(windows(batch, settings.window))
    for number, piece in enumerate(pieces):
        ends = number == len(pieces) - 1
        cut = ends or (number + 1) % settings.tbptt_windows == 0
        with team.no_sync(called, quiet=not (last and number >= _last_group(len(pieces), settings.tbptt_windows))):
            loss, state = batch_loss(called, piece, state)
            pending = loss * weight if pending is None else pending + loss * weight
            if cut:
                pending.backward()
                total, pending = total + pending.item(), None
                state = None if ends else state.detach()
    return total


def _passes(batch: Batch, settings: TrainSettings) -> int:
    """The number of backward passes of a micro-batch."""
    length = batch.idx.shape[1] - 1
    return 1 if settings.window is None else -(-length // (settings.window * settings.tbptt_windows))


def windows(batch: Batch, window: int | None) -> Iterator[Batch]:
    """A batch split into pieces of `window` tokens; the last one may be shorter."""
    length = batch.idx.shape[1] - 1
    step = length if window is None else window
    for start in range(0, length, step):
        end = min(start + step, length)
        loss_mask, document_start = (
            None if mask is None else mask[:, start:end] for mask in (batch.loss_mask, batch.document_start)
        )
        yield Batch(batch.idx[:, start : end + 1], loss_mask, document_start)


def _last_group(pieces: int, tbptt_windows: int) -> int:
    """The first of the windows that share the last backward pass."""
    return (pieces - 1) // tbptt_windows * tbptt_windows


def clip(model: nn.Module, limit: float, step: int, loss: float) -> float:
    """Scale the gradients down to a norm of at most `limit`. Returns the norm before."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = float(whole(nn.utils.clip_grad_norm_(parameters, limit)))
    if not math.isfinite(norm):
        raise NotFinite(
            f"step {step}: the gradient is not finite (loss {loss:.3g}); the last good weights are saved. "
            "Continue from them with the same command and a lower learning rate, or see the published remedies for "
            "loss spikes (docs/guides/training.md)"
        )
    return norm
