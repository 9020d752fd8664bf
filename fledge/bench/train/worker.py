"""One measurement of `fledge bench train` in its own process: `python -m fledge.bench.train.worker job.json`.

There are four kinds of job. All have "kind", "threads" and "device":

    step      training steps of one program: "program", "config", "dtype", "length", "rows", "steps"
    passing   one row trained by windows with state passing: "config", "length", "window", "tbptt_windows", "steps"
    kernel    the recurrence alone, forward and backward: "backend", "shape" (B, T, H, N), "repeats"
    product   torch's product of two large matrices: "dtype", "size"
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fledge.bench.machine_limits import product_rate
from fledge.bench.measurement import JobResult, run_worker, time_calls
from fledge.checkpoint.formats.huggingface.settings import make_fla_config
from fledge.core.config import from_dict
from fledge.core.machine import peak_memory
from fledge.data.batches import Batch
from fledge.kernels import wkv
from fledge.kernels.dispatch import prefer
from fledge.models import ModelConfig, build, init_weights
from fledge.models.layers import set_compute_dtype
from fledge.train.distributed import Distributed
from fledge.train.loop import TrainSettings, compute_gradients
from fledge.train.loss import head_loss, next_token_loss
from fledge.train.memory import keep_freed_memory
from fledge.train.optim import AdamSettings, build_optimizer, set_learning_rate
from fledge.train.schedule import LearningRateSchedule

BACKENDS = {"chunked": "chunked", "loop": "reference"}  # of the recurrence, for programs that need a certain one
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEARNING_RATE = 1e-4  # large enough to change the weights, small enough to keep training stable
WARMUP = 1  # steps that are not counted: they allocate memory and, on a GPU, compile kernels


class FlaModel(nn.Module):
    """flash-linear-attention's RWKV-6 behind our interface. Mixed precision is torch's autocast, as usual for it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        from fla.models import RWKV6Config, RWKV6ForCausalLM

        settings = {**make_fla_config(config), "use_cache": False, "fuse_cross_entropy": False}
        self.inner = RWKV6ForCausalLM(RWKV6Config(**settings))
        self.dtype = dtype

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        """idx (B, T) -> logits (B, T, vocab) float32."""
        with torch.autocast(idx.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits: Tensor = self.inner(idx).logits
        return logits.float(), None


def build_model(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """Build a model of this package as at the start of training, with matrix products in `dtype`."""
    model = build(config)
    init_weights(model, 0)
    set_compute_dtype(model, None if dtype == torch.float32 else dtype)
    return model


class StepTimer:
    """The seconds of each part of a step, including the work of the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.parts: list[float] = []
        self._last = self._now()

    def mark(self) -> None:
        """End a part."""
        now = self._now()
        self.parts.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def model_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of batch (B, T + 1). Our models do not store the logits of all tokens for it."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    if isinstance(model, FlaModel):
        return next_token_loss(model(inputs)[0], targets)
    loss: Tensor = model(inputs, readout=partial(head_loss, targets=targets))[0]
    return loss / targets.numel()


def run_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> tuple[float, list[float]]:
    """Run one step on batch (B, T + 1). Return the loss, and the seconds of forward with loss, backward and update."""
    timer = StepTimer(batch.device)
    loss = model_loss(model, batch)
    timer.mark()
    loss.backward()
    timer.mark()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    timer.mark()
    return loss.item(), timer.parts


def measure_step(job: dict[str, Any]) -> JobResult:
    """Measure the seconds of each part of each step, and memory. `before_bytes` is the process without a model."""
    device, config = torch.device(job["device"]), from_dict(ModelConfig, job["config"])
    if device.type == "cpu":
        keep_freed_memory()  # as in every training run
    before = 0 if device.type == "cuda" else peak_memory()
    torch.manual_seed(0)
    prefer(BACKENDS.get(job["program"]))  # global, but this process does nothing else
    create = FlaModel if job["program"] == "fla" else build_model
    model = create(config, DTYPES[job["dtype"]]).to(device)
    optimizer = build_optimizer(model, AdamSettings())
    set_learning_rate(optimizer, LEARNING_RATE)
    batch = torch.randint(config.vocab_size, (job["rows"], job["length"] + 1)).to(device)
    steps, cpu_seconds = [], []
    for _ in range(WARMUP + job["steps"]):
        started = time.process_time()
        steps.append(run_step(model, optimizer, batch))
        cpu_seconds.append(time.process_time() - started)
    steps = steps[WARMUP:]
    forward, backward, update = (list(part) for part in zip(*(parts for _, parts in steps), strict=True))
    return {
        "forward_s": forward,
        "backward_s": backward,
        "update_s": update,
        "cpu_s": cpu_seconds[WARMUP:],
        "loss": steps[-1][0],
        "before_bytes": before,
        "peak_bytes": _peak_memory(device),
    }


def measure_passing(job: dict[str, Any]) -> JobResult:
    """Measure peak memory while the training loop computes the gradients of one row, window by window."""
    device, config = torch.device(job["device"]), from_dict(ModelConfig, job["config"])
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    model = build_model(config, torch.float32).to(device)
    optimizer = build_optimizer(model, AdamSettings())
    set_learning_rate(optimizer, LEARNING_RATE)
    schedule = LearningRateSchedule(LEARNING_RATE, LEARNING_RATE, 0, job["steps"])
    settings = TrainSettings(schedule, window=job["window"], tbptt_windows=job["tbptt_windows"])
    batch = Batch(torch.randint(config.vocab_size, (1, job["length"] + 1)).to(device))
    losses = []
    for _ in range(job["steps"]):
        losses.append(compute_gradients(model, [batch], settings, Distributed())[0])
        optimizer.step()
    return {"peak_bytes": _peak_memory(device), "loss": losses[-1]}


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def measure_kernel(job: dict[str, Any]) -> JobResult:
    """Measure the seconds of each forward and backward pass of the recurrence, with gradients of all six inputs."""
    B, T, H, N = job["shape"]
    device, generator = torch.device(job["device"]), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    w = -torch.exp(torch.rand(B, T, H, N, generator=generator) * 5 - 6).to(
        device
    )  # the range of decays at the start of training
    r, k, v = (normal(B, T, H, N) for _ in range(3))
    u, state = normal(H, N), normal(B, H, N, N)
    leaves = [leaf.requires_grad_() for leaf in (r, k, v, w, u, state)]
    weights = [normal(B, T, H, N), normal(B, H, N, N)]

    def call() -> None:
        outputs = wkv(r, k, v, w, u, state, backend=job["backend"])
        torch.autograd.grad(outputs, leaves, weights)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return {"seconds": time_calls(call, repeats=job["repeats"]), "peak_bytes": peak_memory()}


def measure(job: dict[str, Any]) -> JobResult:
    """Run one job."""
    torch.set_num_threads(job["threads"])
    if job["kind"] == "product":
        return {"operations_per_s": product_rate(DTYPES[job["dtype"]], job["size"], job["device"])}
    return {"kernel": measure_kernel, "passing": measure_passing, "step": measure_step}[job["kind"]](job)


if __name__ == "__main__":
    run_worker(measure)
