"""One measurement of `fledge bench train` in a process of its own: `python -m fledge.bench.train_worker job.json`.

The result is the last line printed. Four kinds of job, all with "kind", "threads" and "device":

    step      training steps of one program: "program", "config", "dtype", "length", "rows", "steps"
    passing   one row read by windows with the state carried on: "config", "length", "window", "through", "steps"
    kernel    the recurrence alone, forward and backward: "backend", "shape" (B, T, H, N), "repeats"
    product   torch's product of two large matrices: "dtype", "size"

Not here: which jobs there are, and in which order (train.py).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fledge.bench.harness import peak_memory, time_calls
from fledge.bench.limits import product
from fledge.checkpoint.formats.huggingface.settings import make_fla_config
from fledge.core.config import from_dict
from fledge.data.batches import Batch
from fledge.kernels import wkv
from fledge.kernels.dispatch import prefer
from fledge.models import ModelConfig, build, init_weights
from fledge.models.layers import set_compute_dtype
from fledge.train.distributed import Distributed
from fledge.train.loop import TrainSettings, gradients
from fledge.train.loss import head_loss, next_token_loss
from fledge.train.memory import keep_freed_memory
from fledge.train.optim import AdamSettings, build_optimizer, set_learning_rate
from fledge.train.schedule import LearningRateSchedule

BACKENDS = {"chunked": "chunked", "loop": "reference"}  # of the recurrence, for programs that ask for one
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATE = 1e-4  # learning rate; large enough that the numbers change, small enough that they stay sound
WARMUP = 1  # steps that do not count: memory is fetched, and on a GPU kernels are compiled


class FlaModel(nn.Module):
    """flash-linear-attention's own RWKV-6, with our forward. Mixed precision is torch's autocast, as its users do."""

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


def ours(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """A model of this package as training begins, with matrix products in `dtype`."""
    model = build(config)
    init_weights(model, 0)
    set_compute_dtype(model, None if dtype == torch.float32 else dtype)
    return model


PROGRAMS: dict[str, Callable[[ModelConfig, torch.dtype], nn.Module]] = {
    "finch": ours,
    "eagle": ours,
    "transformer": ours,
    "chunked": ours,
    "loop": ours,
    "fla": FlaModel,
}


class Clock:
    """Seconds of the parts of a step, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.parts: list[float] = []
        self._last = self._now()

    def mark(self) -> None:
        """A part ends here."""
        now = self._now()
        self.parts.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def model_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean loss of batch (B, T + 1), computed as its users do: ours without the logits of all tokens."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    if isinstance(model, FlaModel):
        return next_token_loss(model(inputs)[0], targets)
    loss: Tensor = model(inputs, readout=partial(head_loss, targets=targets))[0]
    return loss / targets.numel()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> tuple[float, list[float]]:
    """One step on batch (B, T + 1): the loss, and the seconds of forward with loss, backward and update."""
    clock = Clock(batch.device)
    loss = model_loss(model, batch)
    clock.mark()
    loss.backward()
    clock.mark()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clock.mark()
    return loss.item(), clock.parts


def measure_step(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each part of each step, and bytes: `before_bytes` is the process without any model."""
    device, config = torch.device(job["device"]), from_dict(ModelConfig, job["config"])
    if device.type == "cpu":
        keep_freed_memory()  # as every training run does
    before = 0 if device.type == "cuda" else peak_memory()
    torch.manual_seed(0)
    prefer(BACKENDS.get(job["program"]))  # this process does nothing else
    model = PROGRAMS[job["program"]](config, DTYPES[job["dtype"]]).to(device)
    optimizer = build_optimizer(model, AdamSettings())
    set_learning_rate(optimizer, RATE)
    batch = torch.randint(config.vocab_size, (job["rows"], job["length"] + 1)).to(device)
    done, processor = [], []
    for _ in range(WARMUP + job["steps"]):
        began = time.process_time()
        done.append(step(model, optimizer, batch))
        processor.append(time.process_time() - began)
    done = done[WARMUP:]
    forward, backward, update = (list(part) for part in zip(*(parts for _, parts in done), strict=True))
    return {
        "forward_s": forward,
        "backward_s": backward,
        "update_s": update,
        "cpu_s": processor[WARMUP:],
        "loss": done[-1][0],
        "before_bytes": before,
        "peak_bytes": _peak(device),
    }


def measure_passing(job: dict[str, Any]) -> dict[str, Any]:
    """The peak of memory while the training loop's own gradients of one row are taken, window by window."""
    device, config = torch.device(job["device"]), from_dict(ModelConfig, job["config"])
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    model = ours(config, torch.float32).to(device)
    optimizer = build_optimizer(model, AdamSettings())
    set_learning_rate(optimizer, RATE)
    schedule = LearningRateSchedule(RATE, RATE, 0, job["steps"])
    settings = TrainSettings(schedule, window=job["window"], through=job["through"])
    batch = Batch(torch.randint(config.vocab_size, (1, job["length"] + 1)).to(device))
    losses = []
    for _ in range(job["steps"]):
        losses.append(gradients(model, [batch], settings, Distributed())[0])
        optimizer.step()
    return {"peak_bytes": _peak(device), "loss": losses[-1]}


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def measure_kernel(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each forward and backward pass of the recurrence, with gradients of all six inputs."""
    B, T, H, N = job["shape"]
    device, draw = torch.device(job["device"]), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    w = -torch.exp(torch.rand(B, T, H, N, generator=draw) * 5 - 6).to(device)  # decays as training begins with
    r, k, v = (normal(B, T, H, N) for _ in range(3))
    u, state = normal(H, N), normal(B, H, N, N)
    leaves = [leaf.requires_grad_() for leaf in (r, k, v, w, u, state)]
    weights = [normal(B, T, H, N), normal(B, H, N, N)]

    def call() -> None:
        outputs = wkv(r, k, v, w, u, state, backend=job["backend"])
        torch.autograd.grad(outputs, leaves, weights)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return {"seconds": list(time_calls(call, repeats=job["repeats"]).values), "peak_bytes": peak_memory()}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The result of one job, as plain JSON."""
    torch.set_num_threads(job["threads"])
    if job["kind"] == "product":
        return {"operations_per_s": product(DTYPES[job["dtype"]], job["size"], job["device"])}
    return {"kernel": measure_kernel, "passing": measure_passing, "step": measure_step}[job["kind"]](job)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
