"""The training loop, from top to bottom: rows, windows with carried state, accumulation, update, metrics.

The loss of a step is the mean over all its counted targets, for any division into rows, windows and processes. With
`window`, a row is split into windows and the state is passed on between them (truncated backpropagation through time).
The gradient flows back through `tbptt_windows` windows, so memory does not depend on the length of the rows. Everything
else either is a function of the step number or is saved in the checkpoint, so a resumed run is bit-identical to an
uninterrupted one.
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
from fledge.train.distributed import Distributed, gather_full
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
    window: int | None = None  # tokens; the state is passed on from window to window; None: the whole row
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


class NonFiniteGradient(TrainingError):
    """A gradient is not finite. All processes detect it in the same step."""


Validate = Callable[[Any], dict[str, float]]

SETTINGS_FILE = "run.json"
"""The settings and the data of a run, for people. It is never read back."""


def train(
    model: nn.Module,
    batches: Batches,
    settings: TrainSettings,
    folder: Path,
    validate: Validate = lambda model: {},
    report: Report = lambda line: None,
    *,
    distributed: Distributed = Distributed(),  # noqa: B008 - a value, never changed
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
    with try_lock_folder(folder) if distributed.is_main else nullcontext(True) as is_locked:
        if not is_locked:
            raise TrainingError(f"another run is using {folder}; choose another folder, or wait until it ends")
        called = distributed.wrap(prepare(model, settings))
        optimizer = build_optimizer(model, settings.adam)
        run_checkpoint = RunCheckpoint(folder, distributed, identity or {})
        step, pending_metrics = run_checkpoint.resume(model, optimizer)
        if distributed.is_main:
            write_json(folder / SETTINGS_FILE, {"settings": _to_plain_values(settings), **(identity or {})})
        metrics = MetricsLogger(folder / "metrics.jsonl", report, writes=distributed.is_main)
        metrics.rewind(step, pending_metrics)
        if 0 < step < settings.schedule.steps and distributed.is_main:
            report({"step": step})
        with catch_signals(always_defer=distributed.world > 1) as stop:
            progress = _Progress(model, optimizer, run_checkpoint, metrics, stop, step)
            write_metrics = partial(_write_metrics, metrics, settings, partial(validate, called), stop)
            with progress.save_on_error():
                write_metrics(progress.step)  # lines that were due when the run was interrupted
                while progress.step < settings.schedule.steps:
                    numbers = range(progress.step * settings.accumulate, (progress.step + 1) * settings.accumulate)
                    micro_batches = [distributed.shard(batches[number]) for number in numbers]
                    loss, targets = compute_gradients(called, micro_batches, settings, distributed)
                    norm = clip_gradients(model, settings.clip, progress.step + 1, loss)
                    rate = settings.schedule.rate(progress.step)
                    set_learning_rate(optimizer, rate)
                    with progress.update_weights():
                        optimizer.step()
                        progress.step += 1
                        metrics.add(loss, targets, norm=norm, rate=rate)
                    if number := distributed.largest(stop.number):
                        raise Interrupted(number)
                    write_metrics(progress.step)
                    if progress.step % settings.save_every == 0 or progress.step == settings.schedule.steps:
                        progress.save()


@dataclass
class _Progress:
    """The progress of a run, which is saved when the run ends for any reason."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    checkpoint: RunCheckpoint
    metrics: MetricsLogger
    stop: StopRequest
    step: int  # completed steps
    is_consistent: bool = True  # False while the weights and the number of steps do not match

    @contextmanager
    def update_weights(self) -> Iterator[None]:
        """Context manager for the update of the weights."""
        with self.stop.defer():
            self.is_consistent = False
            yield
            self.is_consistent = True

    def save(self) -> None:
        """Save a checkpoint. All processes must call this."""
        with self.stop.defer():
            self.checkpoint.save(self.model, self.optimizer, self.step, self.metrics.pending())

    @contextmanager
    def save_on_error(self) -> Iterator[None]:
        """Save the progress if the block ends with an error. If one of several processes fails alone, it does not save,
        because it would wait for the others.
        """
        distributed = self.checkpoint.distributed
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            all_fail = distributed.world == 1 or isinstance(error, Interrupted | NonFiniteGradient)
            if all_fail and self.is_consistent and not isinstance(error, SaveError):
                self.save()
            if isinstance(error, KeyboardInterrupt):
                number = getattr(error, "number", signal.SIGINT)
                message = _describe_saved(self.checkpoint.written) if distributed.is_main else ""
                raise Interrupted(number, message) from None
            raise


def _describe_saved(step: int) -> str:
    if not step:
        return "stopped before the first step was complete; nothing is saved"
    return f"saved at step {step}; the same command continues from there"


def _to_plain_values(settings: TrainSettings) -> dict[str, Any]:
    return {**asdict(settings), "compute_dtype": str(settings.compute_dtype or torch.float32).removeprefix("torch.")}


def _write_metrics(
    metrics: MetricsLogger,
    settings: TrainSettings,
    validate: Callable[[], dict[str, float]],
    stop: StopRequest,
    step: int,
) -> None:
    """Write the lines that are due after a step: all or none of them, each once."""
    if step == metrics.last_step:
        return
    validation: dict[str, float] = {}
    if step % settings.validate_every == 0 or step == settings.schedule.steps:
        with stop.defer(0):  # may be interrupted: a continued run repeats the validation
            validation = validate()
            return_freed_memory()
    with stop.defer():
        if step % settings.log_every == 0:
            metrics.write(step, **metrics.update)
        if validation:
            metrics.write(step, **validation)
        metrics.last_step = step


def prepare(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """Set the dtype of the products, and apply compilation and activation checkpointing to each block."""
    set_compute_dtype(model, settings.compute_dtype)
    blocks: Any = model.blocks
    if settings.compile:
        prepare_tracing()
    for block in blocks:
        if settings.compile:
            # Not the block itself: torch.compile would specialize on its layer number and compile each one separately.
            block.att.compile(dynamic=False)
            block.ffn.compile(dynamic=False)
        if settings.activation_checkpointing and not isinstance(block.forward, partial):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def compute_gradients(
    called: nn.Module, micro_batches: list[Batch], settings: TrainSettings, distributed: Distributed
) -> tuple[float, int]:
    """Forward and backward over a step's rows. Returns the mean loss and the number of targets, over all processes."""
    # If a step accumulates several backward passes, the gradient buffers are kept. Allocating them again in the middle
    # of a step would fragment memory, and the next pass would need more (5% at rows of 65,536 tokens).
    accumulates = len(micro_batches) > 1 or any(_count_passes(batch, settings) > 1 for batch in micro_batches)
    called.zero_grad(set_to_none=not accumulates)
    targets = distributed.total(float(sum(batch.targets for batch in micro_batches)))
    if not targets:
        raise TrainingError("a step has no target that counts; every example's answer may have been cut off")
    # DDP and FSDP average gradients over the processes, but each process sums the loss over its own rows only. The
    # factor `world` undoes the averaging.
    weight = distributed.world / targets
    loss = 0.0
    for batch in micro_batches:
        loss += backward(called, batch, weight, settings, distributed, last=batch is micro_batches[-1])
    return distributed.total(loss) / distributed.world, int(targets)


def backward(
    called: nn.Module, batch: Batch, weight: float, settings: TrainSettings, distributed: Distributed, *, last: bool
) -> float:
    """Run forward and backward over one micro-batch, window by window.

    last: whether it is the last of the step, after which the processes exchange their gradients.
    """
    state: State | None = None
    pending: Tensor | None = None
    total = 0.0
    parts = list(windows(batch, settings.window))
    last_group = _first_of_last_group(len(parts), settings.tbptt_windows)
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        ends_group = is_last or (number + 1) % settings.tbptt_windows == 0
        with distributed.no_sync(called, quiet=not (last and number >= last_group)):
            loss, state = batch_loss(called, part, state)
            pending = loss * weight if pending is None else pending + loss * weight
            if ends_group:
                pending.backward()
                total, pending = total + pending.item(), None
                state = None if is_last else state.detach()
    return total


def _count_passes(batch: Batch, settings: TrainSettings) -> int:
    """The number of backward passes of a micro-batch."""
    length = batch.idx.shape[1] - 1
    return 1 if settings.window is None else -(-length // (settings.window * settings.tbptt_windows))


def windows(batch: Batch, window: int | None) -> Iterator[Batch]:
    """A batch split into windows of this many tokens; the last one may be shorter."""
    length = batch.idx.shape[1] - 1
    step = length if window is None else window
    for start in range(0, length, step):
        end = min(start + step, length)
        loss_mask, document_start = (
            None if mask is None else mask[:, start:end] for mask in (batch.loss_mask, batch.document_start)
        )
        yield Batch(batch.idx[:, start : end + 1], loss_mask, document_start)


def _first_of_last_group(count: int, tbptt_windows: int) -> int:
    """The number of the first window that takes part in the last backward pass."""
    return (count - 1) // tbptt_windows * tbptt_windows


def clip_gradients(model: nn.Module, limit: float, step: int, loss: float) -> float:
    """Scale the gradients down to a norm of at most `limit`. Returns the norm before clipping. step: from 1."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = float(gather_full(nn.utils.clip_grad_norm_(parameters, limit)))
    if not math.isfinite(norm):
        raise NonFiniteGradient(
            f"step {step}: the gradient is not finite (loss {loss:.3g}), so the weights were not changed; use the same "
            "command with a lower learning rate, which continues from the last saved step, or see the published "
            "remedies for loss spikes (docs/guides/training.md)"
        )
    return norm
