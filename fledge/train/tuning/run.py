"""A fine-tuning run: reads the base and the examples, trains with the common loop, and writes the result.

The folder of a run contains run.json, last.pt and metrics.jsonl from the loop, and finally the result. Starting the
same run again continues it. The base, the data, and all settings except those in MAY_CHANGE must then be the same.
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
from fledge.train.run_checkpoint import trained_parameters
from fledge.train.tuning.estimate import CostEstimate, estimate
from fledge.train.tuning.settings import TuneSettings, build_train_settings, build_trainable_model

MAY_CHANGE = ("rate", "final_rate")
"""Settings that may change when a run continues."""


@dataclass(frozen=True)
class TuningResult:
    """The files that a run has written: one for Fledge, and others for other programs."""

    path: Path
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TuningRun:
    """Everything that a run needs, before it starts."""

    base: Checkpoint
    model: BaseModel
    tokenizer: Tokenizer
    examples: Examples
    settings: TuneSettings
    validation: Examples | None = None
    compute_dtype: torch.dtype | None = None

    @property
    def batches(self) -> ExampleBatches:
        """The batches of examples, in order."""
        return ExampleBatches(self.examples.items, self.settings.batch, self.settings.seed)

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return self.settings.count_steps(self.batches.per_epoch)

    @property
    def epochs(self) -> float:
        """The number of times that every example is read."""
        return self.steps * self.settings.accumulate / self.batches.per_epoch

    def estimate(self) -> CostEstimate:
        """Estimate memory and time by running a few batches."""
        return estimate(self.model, self.batches, build_train_settings(self.settings, self.steps, self.compute_dtype))

    def start(self, folder: Path, report: Report) -> TuningResult:
        """Train to the end, or continue the run in `folder`. `report` is called with every line of its metrics.

        Raises CheckpointError if the folder contains another run.
        """
        base, data = describe_base(self.base), hash_file(self.examples.path)
        settings = json.loads(json.dumps(asdict(self.settings)))
        fixed = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
        identity = {"base": base.identity, "data": data, **fixed}
        keep_freed_memory()
        options = build_train_settings(self.settings, self.steps, self.compute_dtype)
        train(self.model, self.batches, options, folder, self._validate, report, identity=identity)
        record = {"data": self.examples.path.name, "data_sha256": data, **settings, **self._resolved_settings()}
        if self.settings.mode != "lora":
            del record["lora"]
        if not self.examples.conversations:
            del record["template"]  # the examples did not use it
        kind = "state" if self.settings.mode == "state" else "lora"
        return _write_result(self, folder, Adapter(kind, {}, None, base, folder, record))

    def _resolved_settings(self) -> dict[str, float]:
        """The values of settings that depend on the mode and the data."""
        schedule = self.settings.schedule(self.steps)
        rates = {"rate": schedule.max_lr, "final_rate": schedule.min_lr, "warmup_steps": schedule.warmup_steps}
        return {"steps": self.steps, "epochs": self.epochs, **rates}

    def _validate(self, model: BaseModel) -> dict[str, float]:
        if self.validation is None:
            return {}
        return {"validation_loss": compute_mean_loss(model, self.validation.items, self.settings.batch)}


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
    """Read the examples and build the model.

    dtype: of the matrix products, and of the matrices that are not trained; None: float32 for a small model on a CPU,
    else bfloat16. Raises UsageError for invalid examples and an unknown device or dtype.
    """
    read = partial(read_examples, tokenizer=tokenizer, template=settings.template, length=settings.length)
    examples, validation = read(data), None if validate is None else read(validate)
    torch_device, _ = choose_device(device)
    parameters = sum(tensor.numel() for tensor in base.tensors.values())
    matrix_dtype, _ = choose_dtype(dtype, torch_device, parameters)
    if matrix_dtype == torch.float16:
        raise UsageError("dtype float16 overflows in training; choose float32 or bfloat16")
    matrix_dtype = matrix_dtype or torch.bfloat16
    model = build_trainable_model(base, settings, device=torch_device, dtype=matrix_dtype)
    compute_dtype = None if matrix_dtype == torch.float32 else matrix_dtype
    set_compute_dtype(model, compute_dtype)
    return TuningRun(base, model, tokenizer, examples, settings, validation, compute_dtype)


@torch.no_grad()
def compute_mean_loss(model: BaseModel, examples: tuple[Example, ...], batch: int = 4) -> float:
    """The mean cross-entropy over all tokens of the loss mask."""
    batches = ExampleBatches(examples, batch, 0)
    total, tokens = 0.0, 0
    for number in range(batches.per_epoch):
        current = batches[number]
        total += float(batch_loss(model, current)[0])
        tokens += current.targets
    return total / tokens


def _write_result(run: TuningRun, folder: Path, adapter: Adapter) -> TuningResult:
    """Write the files of a finished run."""
    tensors = {name: tensor.cpu() for name, tensor in trained_parameters(run.model).items()}
    base, settings = run.base, run.settings
    if settings.mode == "full":
        assert adapter.base is not None
        path, record = folder / "model.safetensors", {"from": adapter.base.identity, **adapter.training}
        weights = {name: _convert_if_finite(tensor, base.tensors[name].dtype) for name, tensor in tensors.items()}
        template = adapter.template or base.template
        extra = {"base": base.extra, "tuned": record, **({"template": template} if template else {})}
        save(path, base.config, weights, tokenizer_spec=base.tokenizer_spec, extra=extra)
        return TuningResult(path)
    if settings.mode == "lora":
        path = folder / "adapter.safetensors"
        save_adapter(path, replace(adapter, tensors=tensors, alpha=settings.lora.alpha))
        return TuningResult(path)
    path, pth_path = folder / "state.safetensors", folder / "state.pth"
    for target in (path, pth_path):
        save_adapter(target, replace(adapter, tensors=tensors))
    return TuningResult(path, (pth_path,))


def _convert_if_finite(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, or unchanged if a number would overflow (float16 ends at 65504)."""
    converted = tensor.to(dtype)
    return converted if bool(converted.isfinite().all()) else tensor
