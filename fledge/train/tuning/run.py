"""One fine-tuning run: base and examples brought together, trained with the common loop, and what it leaves behind.

A run's folder holds the loop's own run.json, last.pt and metrics.jsonl, and at the end the result. Starting the same
run again continues where it stopped; another base, other data, or other settings than MAY_CHANGE are refused.
Not here: what is trained (tuning.py), the loop (loop.py), printing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fledge.checkpoint import Adapter, Checkpoint, describe_base, save, save_adapter
from fledge.core.device import choose_device, choose_dtype
from fledge.core.errors import UsageError
from fledge.core.files import hash_file
from fledge.data.examples import Example, ExampleBatches, Examples, read_examples
from fledge.models import BaseModel
from fledge.models.layers import set_compute_dtype
from fledge.tokenizer import Tokenizer
from fledge.train.loop import train
from fledge.train.loss import batch_loss
from fledge.train.memory import keep_freed_memory
from fledge.train.metrics import Report
from fledge.train.run_checkpoint import trained
from fledge.train.tuning.estimate import CostEstimate, estimate
from fledge.train.tuning.settings import TuneSettings, train_settings, tunable

MAY_CHANGE = ("rate", "final_rate")
"""Settings with which a run may go on that are not those it began with."""


@dataclass(frozen=True)
class TuningResult:
    """What a run wrote: the file to use, and others for other programs."""

    path: Path
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TuningRun:
    """Everything a run needs, before it has done anything."""

    base: Checkpoint
    model: BaseModel
    tokenizer: Tokenizer
    examples: Examples
    settings: TuneSettings
    validation: Examples | None = None
    compute_dtype: torch.dtype | None = None

    @property
    def batches(self) -> ExampleBatches:
        """The examples in their order."""
        return ExampleBatches(self.examples.items, self.settings.batch, self.settings.seed)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.settings.count_steps(self.batches.per_epoch)

    @property
    def epochs(self) -> float:
        """How often every example is read."""
        return self.steps * self.settings.accumulate / self.batches.per_epoch

    def estimate(self) -> CostEstimate:
        """Memory and time; tries a few batches."""
        return estimate(self.model, self.batches, train_settings(self.settings, self.steps, self.compute_dtype))

    def start(self, folder: Path, report: Report) -> TuningResult:
        """Train to the end, or continue with the run in `folder`; `report` is given every line of its metrics.

        Raises CheckpointError where the folder holds another run.
        """
        base, data = describe_base(self.base), hash_file(self.examples.path)
        settings = json.loads(json.dumps(asdict(self.settings)))
        fixed = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
        identity = {"base": base.identity, "data": data, **fixed}
        keep_freed_memory()
        options = train_settings(self.settings, self.steps, self.compute_dtype)
        train(self.model, self.batches, options, folder, self._validate, report, identity=identity)
        training = {"data": self.examples.path.name, "data_sha256": data, **settings, **self._chosen()}
        if self.settings.mode != "lora":
            del training["lora"]
        if not self.examples.conversations:
            del training["template"]  # none was learnt
        kind = "state" if self.settings.mode == "state" else "lora"
        return _write(self, folder, Adapter(kind, {}, None, base, folder, training))

    def _chosen(self) -> dict[str, float]:
        """What settings may leave to the mode and the data, as it was."""
        schedule = self.settings.schedule(self.steps)
        rates = {"rate": schedule.max_lr, "final_rate": schedule.min_lr, "warmup_steps": schedule.warmup_steps}
        return {"steps": self.steps, "epochs": self.epochs, **rates}

    def _validate(self, model: BaseModel) -> dict[str, float]:
        if self.validation is None:
            return {}
        return {"validation_loss": mean_loss(model, self.validation.items, self.settings.batch)}


def prepare(
    base: Checkpoint,
    tokenizer: Tokenizer,
    data: Path,
    settings: TuneSettings,
    *,
    validate: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> TuningRun:
    """Read the examples and make the model.

    dtype: of the products with matrices, and of those that are not trained; None is float32 for a small model on a CPU,
    else bfloat16. Raises UsageError for bad examples, an unknown device or dtype.
    """
    read = partial(read_examples, tokenizer=tokenizer, template=settings.template, length=settings.length)
    examples, held_out = read(data), None if validate is None else read(validate)
    place, _ = choose_device(device)
    numbers = sum(tensor.numel() for tensor in base.tensors.values())
    chosen, _ = choose_dtype(dtype, place, numbers)
    if chosen == torch.float16:
        raise UsageError("dtype float16 overflows in training; choose float32 or bfloat16")
    chosen = chosen or torch.bfloat16
    model = tunable(base, settings, device=place, dtype=chosen)
    compute = None if chosen == torch.float32 else chosen
    set_compute_dtype(model, compute)
    return TuningRun(base, model, tokenizer, examples, settings, held_out, compute)


@torch.no_grad()
def mean_loss(model: BaseModel, examples: tuple[Example, ...], batch: int = 4) -> float:
    """Mean cross-entropy over all tokens that count."""
    batches = ExampleBatches(examples, batch, 0)
    total, tokens = 0.0, 0
    for number in range(batches.per_epoch):
        one = batches[number]
        total += float(batch_loss(model, one)[0])
        tokens += one.targets
    return total / tokens


def _write(run: TuningRun, folder: Path, adapter: Adapter) -> TuningResult:
    """The result of a finished run."""
    tensors = {name: tensor.cpu() for name, tensor in trained(run.model).items()}
    found, settings = run.base, run.settings
    if settings.mode == "full":
        assert adapter.base is not None
        path, facts = folder / "model.safetensors", {"from": adapter.base.identity, **adapter.training}
        kept = {name: _narrowed(tensor, found.tensors[name].dtype) for name, tensor in tensors.items()}
        template = adapter.template or found.template
        extra = {"base": found.extra, "tuned": facts, **({"template": template} if template else {})}
        save(path, found.config, kept, tokenizer_spec=found.tokenizer_spec, extra=extra)
        return TuningResult(path)
    if settings.mode == "lora":
        path = folder / "adapter.safetensors"
        save_adapter(path, replace(adapter, tensors=tensors, alpha=settings.lora.alpha))
        return TuningResult(path)
    path, plain = folder / "state.safetensors", folder / "state.pth"
    for target in (path, plain):
        save_adapter(target, replace(adapter, tensors=tensors))
    return TuningResult(path, (plain,))


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the base's dtype, unless that cannot hold it (float16 ends at 65504)."""
    narrow = tensor.to(dtype)
    return narrow if bool(narrow.isfinite().all()) else tensor
